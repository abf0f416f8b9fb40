"""Decodes text with a trained workdir.

python generate.py --workdir=runs/transformer_cldr --input="3 May 2024"
cat sentences.txt | python generate.py --workdir=DIR --method=sample --top_p=0.9
"""

import sys
from collections.abc import Iterable, Iterator

import numpy as np
from absl import flags

from triform import cli
from triform.decode import METHODS
from triform.evaluate import make_generate, one_line
from triform.experiment import (
    Experiment,
    checkpoint_dir,
    for_these_devices,
    open_workdir,
)
from triform.input_pipeline import DataConfig, load_tokenizer
from triform.runtime.checkpoint import Checkpointer
from triform.tokenizer import EOS, PAD, Tokenizer

OVERRIDES = ("method", "beam_size", "length_penalty", "temperature", "top_k", "top_p")


def chunks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of up to `size` lines, as they come: a pipe is answered batch by batch."""
    part = []
    for line in lines:
        part.append(line.rstrip("\n"))
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def encode(
    lines: list[str], first: int, rows: int, data: DataConfig, tok: Tokenizer
) -> dict[str, np.ndarray]:
    """A source batch of exactly `rows` rows, of the shortest bucket that holds all.

    `first` is the number of the first line, for messages.
    """
    ids = tok.encode_batch(lines)
    longest = max(len(x) for x in ids) + 1
    if longest > data.max_len:
        where = next(i for i, x in enumerate(ids) if len(x) + 1 == longest)
        raise cli.UserError(
            f"input line {first + where + 1} ({lines[where][:40]!r}): {longest} "
            f"tokens, the model reads at most data.max_len={data.max_len}; shorten or "
            "split it"
        )
    length = next(n for n in data.lengths() if n >= longest)
    batch = {
        "encoder_inputs": np.full((rows, length), PAD, np.int32),
        "encoder_segments": np.zeros((rows, length), np.int32),
    }
    for r, x in enumerate(ids):
        batch["encoder_inputs"][r, : len(x)] = x
        batch["encoder_inputs"][r, len(x)] = EOS
        batch["encoder_segments"][r, : len(x) + 1] = 1
    return batch


def main(argv: list[str]) -> None:
    """One output line an input line; blank lines give blank lines."""
    flag = flags.FLAGS
    workdir = cli.folder_flag("workdir")
    config = open_workdir(workdir)
    given = [name for name in OVERRIDES if flag[name].value is not None]
    # What only one method reads implies it.
    if {"beam_size", "length_penalty"} & set(given):
        config.decode.method = "beam"
    if {"temperature", "top_k", "top_p"} & set(given):
        config.decode.method = "sample"
    for name in given:
        setattr(config.decode, name, flag[name].value)
    experiment = Experiment(for_these_devices(config))
    with Checkpointer(checkpoint_dir(workdir), config.checkpoint) as checkpointer:
        params, which = experiment.load_params(checkpointer, flag.checkpoint)
    tok = load_tokenizer(workdir)
    print(f"{workdir}: {which}, {config.decode.method}", file=sys.stderr)
    generate = make_generate(experiment)
    if flag.input is not None:
        # Bytes of the command line that are no text.
        lines = [x.encode(errors="replace").decode() for x in flag.input]
        rows = len(lines)
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        lines, rows = sys.stdin, flag.batch_size
        if sys.stdin.isatty():
            rows = 1  # answer every line at once
            print("type a line, Ctrl-D to end", file=sys.stderr)
    for number, part in enumerate(chunks(lines, rows)):
        batch = encode(part, number * rows, rows, config.data, tok)
        tokens, scores = generate(
            params, batch, np.uint32((flag.seed + number) % 2**32)
        )
        for line, row, score in zip(part, np.asarray(tokens), scores, strict=False):
            text = one_line(tok.decode(row)) if line.strip() else ""
            print(f"{float(score):.4f}\t{text}" if flag.scores else text, flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A workdir of train.py.", required=True)
    flags.DEFINE_multi_string("input", None, "Text, repeatable; none: standard input.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, average:K, or a step.")
    flags.DEFINE_integer("batch_size", 32, "Lines decoded together.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of sampling.")
    flags.DEFINE_bool("scores", False, "Print each output's score before it.")
    flags.DEFINE_enum("method", None, METHODS, "Instead of the config's decode.method.")
    flags.DEFINE_integer("beam_size", None, "Instead of decode.beam_size.")
    flags.DEFINE_float("length_penalty", None, "Instead of decode.length_penalty.")
    flags.DEFINE_float("temperature", None, "Instead of decode.temperature.")
    flags.DEFINE_integer("top_k", None, "Instead of decode.top_k.")
    flags.DEFINE_float("top_p", None, "Instead of decode.top_p.")
    cli.launch(main)
