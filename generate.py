"""Writes text with a trained workdir: translates sources, continues prompts.

python generate.py --workdir=runs/transformer_cldr --input="3 May 2024"
cat sentences.txt | python generate.py --workdir=DIR --method=sample --top_p=0.9
python generate.py --workdir=runs/gpt_char --input="ROMEO:" --max_tokens=500
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from triform.configs.schema import ExperimentConfig
from triform.data.codecs.text import Tokenizer
from triform.data.store import load_tokenizer
from triform.evaluate import make_generate, one_line
from triform.experiment import (
    Experiment,
    checkpoint_dir,
    for_these_devices,
    open_workdir,
)
from triform.models import decode
from triform.models.decode import METHODS
from triform.runtime import launch
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError

OVERRIDES = ("method", "beam_size", "length_penalty", "temperature", "top_k", "top_p")
STRETCH = 8  # tokens between two looks at what has been written


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


def sources(
    lines: list[str], first: int, rows: int, config: ExperimentConfig, tok: Tokenizer
) -> dict[str, np.ndarray]:
    """A source batch of exactly `rows` rows, of the shortest bucket that holds all.

    `first` is the number of the first line, for messages.
    """
    ids, data = tok.encode_batch(lines), config.data
    longest = max(len(x) for x in ids) + 1
    if longest > data.max_len:
        where = next(i for i, x in enumerate(ids) if len(x) + 1 == longest)
        raise UserError(
            f"input line {first + where + 1} ({lines[where][:40]!r}): {longest} "
            f"tokens, the model reads at most data.max_len={data.max_len}; shorten or "
            "split it"
        )
    length = next(n for n in data.lengths() if n >= longest)
    batch = {
        "encoder_inputs": np.full((rows, length), tok.pad, np.int32),
        "encoder_segments": np.zeros((rows, length), np.int32),
        "inputs": np.full((rows, 1), tok.start, np.int32),
    }
    for r, x in enumerate(ids):
        batch["encoder_inputs"][r, : len(x)] = x
        batch["encoder_inputs"][r, len(x)] = tok.eos
        batch["encoder_segments"][r, : len(x) + 1] = 1
    return batch


def prompts(ids: list[np.ndarray], rows: int, tok: Tokenizer) -> dict[str, np.ndarray]:
    """A batch of exactly `rows` prompts, padded on the left.

    The length is a power of two, so that few shapes are compiled.
    """
    length = 1 << max(len(x) - 1 for x in ids).bit_length()
    batch = {
        "inputs": np.full((rows, length), tok.pad, np.int32),
        "segments": np.zeros((rows, length), np.int32),
    }
    batch["segments"][:, -1] = 1  # rows without a prompt must have a token
    for r, x in enumerate(ids):
        batch["inputs"][r, length - len(x) :] = x
        batch["segments"][r, length - len(x) :] = 1
    return batch


class Continuation:
    """Continues prompts piece by piece, as far as wanted.

    A window reads at most half of the model's context and writes the other half; its
    end is what the next one reads. So a text does not depend on its neighbours'
    lengths.
    """

    def __init__(self, experiment: Experiment, tok: Tokenizer):
        self.config, self.tokenizer = experiment.config, tok
        config, model = self.config.decode, experiment.model

        def start(params: Any, batch: Any, seed: jax.Array, length: int):
            found = model.apply({"params": params}, batch, length, method="start")
            return decode.begin(*found, length, jax.random.key(seed))

        def advance(params: Any, text: decode.Text, until: jax.Array):
            def extend(*args):
                return model.apply({"params": params}, *args, method="extend")

            return decode.advance(config, extend, text, tok.eos, until)

        self._start = jax.jit(start, static_argnums=3)
        self._advance = jax.jit(advance, donate_argnums=1)

    def __call__(
        self, params: Any, lines: list[str], rows: int, seed: int, limit: int
    ) -> Iterator[tuple[list[list[int]], np.ndarray]]:
        """(ids written so far a line, log-probabilities), a stretch at a time."""
        tok, longest = self.tokenizer, self.config.model.longest()
        read = max(1, longest // 2)
        # A text begins as documents do; a prompt without a mark of its own goes on.
        lead = [tok.eos if tok.bos is None else tok.bos]
        texts = [x.tolist() for x in tok.encode_batch(lines)]
        texts = [x if x and tok.bos is None else lead + x for x in texts]
        given = [len(x) for x in texts]
        scores, ended = np.zeros(len(lines)), np.zeros(len(lines), bool)
        written = 0
        while written < limit and not ended.all():
            batch = prompts([np.array(x[-read:]) for x in texts], rows, tok)
            length = min(longest - read, limit - written)
            room = min(longest - read, limit)
            text = self._start(params, batch, np.uint32(seed), room)
            before, base, over = [*texts], scores, ended
            for until in range(STRETCH, length + STRETCH, STRETCH):
                text = self._advance(params, text, min(until, length))
                tokens = np.asarray(text.tokens)[:, : int(text.count)]
                scores = base + np.where(over, 0, np.asarray(text.score)[: len(lines)])
                for r in np.flatnonzero(~over):
                    ids = tokens[r].tolist()
                    texts[r] = before[r] + ids[: (*ids, tok.eos).index(tok.eos)]
                ended = over | (tokens[: len(lines)] == tok.eos).any(1)
                yield [t[g:] for t, g in zip(texts, given, strict=True)], scores
                if ended.all():
                    break
            written, seed = written + length, seed + 1


def main(argv: list[str]) -> None:
    """One output an input line, or live text of a single prompt."""
    flag = flags.FLAGS
    workdir = launch.folder_flag("workdir")
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
    if not hasattr(experiment.model, "extend"):
        raise UserError(
            f"{workdir}: model={type(config.model).__name__} writes no text; "
            "score it with evaluate.py"
        )
    translates = "encoder_inputs" in config.model.reads
    if not translates and config.decode.method == "beam":
        raise UserError(
            "--method=beam: prompts are continued by greedy or sample; set one of them"
        )
    with Checkpointer(checkpoint_dir(workdir), config.checkpoint) as checkpointer:
        params, which = experiment.load_params(checkpointer, flag.checkpoint)
    tok = load_tokenizer(workdir)
    print(f"{workdir}: {which}, {config.decode.method}", file=sys.stderr)
    write = translate if translates else continue_prompts
    lines, rows = read_lines(flag)
    write(experiment, params, tok, lines, rows)


def read_lines(flag: Any) -> tuple[Iterable[str], int]:
    """(input lines as they come, how many are read together)."""
    if flag.input is not None:
        # Bytes of the command line that are no text.
        lines = [x.encode(errors="replace").decode() for x in flag.input]
        return lines, len(lines)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if not sys.stdin.isatty():
        return sys.stdin, flag.batch_size
    print("type a line, Ctrl-D to end", file=sys.stderr)
    return sys.stdin, 1  # answer every line at once


def translate(
    experiment: Experiment,
    params: Any,
    tok: Tokenizer,
    lines: Iterable[str],
    rows: int,
) -> None:
    """One output line an input line; blank lines give blank lines."""
    flag = flags.FLAGS
    generate = make_generate(experiment, tok)
    for number, part in enumerate(chunks(lines, rows)):
        batch = sources(part, number * rows, rows, experiment.config, tok)
        tokens, scores = generate(
            params, batch, np.uint32((flag.seed + number) % 2**32)
        )
        for line, row, score in zip(part, np.asarray(tokens), scores, strict=False):
            text = one_line(tok.decode(row)) if line.strip() else ""
            print(f"{float(score):.4f}\t{text}" if flag.scores else text, flush=True)


def continue_prompts(
    experiment: Experiment,
    params: Any,
    tok: Tokenizer,
    lines: Iterable[str],
    rows: int,
) -> None:
    """Prompt and continuation: live if there is one, else a line each."""
    flag, go_on = flags.FLAGS, Continuation(experiment, tok)
    for number, part in enumerate(chunks(lines, rows)):
        seed = (flag.seed + number) % 2**31
        stretches = go_on(params, part, rows, seed, flag.max_tokens)
        if len(part) > 1 or flag.scores:
            ids, scores = [[] for _ in part], np.zeros(len(part))
            for ids, scores in stretches:  # noqa: B007  (the last one is the whole)
                pass
            for line, row, score in zip(part, ids, scores, strict=True):
                text = one_line(line + tok.decode(row))
                print(f"{score:.4f}\t{text}" if flag.scores else text, flush=True)
            continue
        print(part[0], end="", flush=True)
        shown = ""
        for (row,), _ in stretches:
            # The last character may be half of one until the next token.
            text = tok.decode(row).removesuffix("\ufffd")
            if text.startswith(shown):
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print()


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A workdir of train.py.", required=True)
    flags.DEFINE_multi_string("input", None, "Text, repeatable; none: standard input.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, average:K, or a step.")
    flags.DEFINE_integer("batch_size", 32, "Lines decoded together.", lower_bound=1)
    flags.DEFINE_integer(
        "max_tokens", 256, "Tokens that continue a prompt, at most.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Of sampling.")
    flags.DEFINE_bool("scores", False, "Print each output's score before it.")
    flags.DEFINE_enum("method", None, METHODS, "Instead of the config's decode.method.")
    flags.DEFINE_integer("beam_size", None, "Instead of decode.beam_size.")
    flags.DEFINE_float("length_penalty", None, "Instead of decode.length_penalty.")
    flags.DEFINE_float("temperature", None, "Instead of decode.temperature.")
    flags.DEFINE_integer("top_k", None, "Instead of decode.top_k.")
    flags.DEFINE_float("top_p", None, "Instead of decode.top_p.")
    launch.launch(main)
