"""Writes with a trained workdir: translates sources, continues prompts, gives labels.

python generate.py --workdir=runs/transformer_cldr --input="3 May 2024"
cat sentences.txt | python generate.py --workdir=DIR --method=sample --top_p=0.9
python generate.py --workdir=runs/gpt_char --input="ROMEO:" --max_tokens=500
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from triform import workdir as workdirs
from triform.data.codecs import Codec
from triform.data.codecs.text import Tokenizer
from triform.data.datasets import request_batch
from triform.experiment import Experiment
from triform.models import decode
from triform.models.decode import METHODS
from triform.runtime import launch, paths
from triform.runtime.errors import UserError

OVERRIDES = ("method", "beam_size", "length_penalty", "temperature", "top_k", "top_p")
STRETCH = 8  # tokens between two looks at what has been written


def make_generate(experiment: Experiment, tok: Tokenizer) -> Any:
    """(variables, batch, seed) -> (tokens [B, length], scores [B]), compiled."""
    config, model = experiment.config, experiment.model
    length = config.decode.max_len or experiment.longest_target()

    @jax.jit
    def generate(variables: Any, batch: Any, seed: jax.Array) -> tuple:
        def extend(tokens: Any, positions: Any, cache: Any) -> tuple:
            return model.apply(variables, tokens, positions, cache, method="extend")

        start = model.apply(variables, batch, length, method="start")
        options = {"eos": tok.eos, "length": length, "rng": jax.random.key(seed)}
        return decode.generate(config.decode, extend, *start, **options)

    return generate


def one_line(text: str) -> str:
    """Text without what would break a line or move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


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

    A pass reads at most half of the model's context and writes the other half; its end
    is what the next one reads. So a text does not depend on its neighbours' lengths.
    """

    def __init__(self, experiment: Experiment, tok: Tokenizer):
        self.tokenizer, self.longest = tok, experiment.config.model.longest()["L"]
        config, model = experiment.config.decode, experiment.model

        def start(variables: Any, batch: Any, seed: jax.Array, length: int) -> Any:
            first = model.apply(variables, batch, length, method="start")
            return decode.begin(*first, length, jax.random.key(seed))

        def advance(variables: Any, text: decode.Text, until: jax.Array) -> Any:
            def extend(*args: Any) -> tuple:
                return model.apply(variables, *args, method="extend")

            return decode.advance(config, extend, text, tok.eos, until)

        self._start = jax.jit(start, static_argnums=3)
        self._advance = jax.jit(advance, donate_argnums=1)

    def __call__(
        self, variables: Any, lines: list[str], rows: int, seed: int, limit: int
    ) -> Iterator[tuple[list[list[int]], np.ndarray]]:
        """(ids written so far a line, log-probabilities), a stretch at a time."""
        tok, longest = self.tokenizer, self.longest
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
            text = self._start(variables, batch, np.uint32(seed), room)
            before, base, over = [*texts], scores, ended
            for until in range(STRETCH, length + STRETCH, STRETCH):
                text = self._advance(variables, text, min(until, length))
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


@dataclasses.dataclass
class Output:
    """The answer to one request."""

    text: str = ""  # written by the model; prompts are not repeated
    score: float = 0.0  # log-probability of the text, or probability of the label
    label: str | float | None = None  # name of the likeliest class, or a number
    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)


class Sampler:
    """A workdir as a function: requests (texts) -> outputs, one each, in order.

    A model that writes text answers with it; a classifier gives label and
    probabilities. `decode` replaces settings of config.decode: method="sample",
    temperature=0.8.
    """

    def __init__(self, workdir: str, checkpoint: str = "best", **decode: Any):
        config = workdirs.open_config(paths.absolute(workdir))
        for name, value in decode.items():
            if name not in OVERRIDES:
                raise UserError(
                    f"{name}={value!r}: no setting of decoding; expected one of "
                    f"{', '.join(OVERRIDES)}"
                )
            setattr(config.decode, name, value)
        self.run = workdirs.open_run(workdir, checkpoint, config)
        self.config, self.experiment = config, self.run.experiment
        self.codecs: Mapping[str, Codec] = self.run.codecs
        self.writes = config.model.generates()
        self.reads_source = "S" in config.model.longest()
        if self.writes and not self.reads_source and config.decode.method == "beam":
            raise UserError(
                "--method=beam: prompts are continued by greedy or sample; set one of "
                "them"
            )
        if self.writes and self.reads_source:
            self._generate = make_generate(self.experiment, self.codecs["text"])
        elif self.writes:
            self.continuation = Continuation(self.experiment, self.codecs["text"])
        else:
            placement = self.experiment.placement
            self._eval = placement.compile_eval(self.experiment.eval_step)

    def __call__(
        self, requests: Sequence[str], *, seed: int = 0, max_tokens: int = 256
    ) -> list[Output]:
        """One output per request; `max_tokens` bounds the continuation of a prompt."""
        return self.answer(list(requests), len(requests), seed, max_tokens)

    def answer(
        self, requests: list[str], rows: int, seed: int, max_tokens: int, first: int = 0
    ) -> list[Output]:
        """Outputs of up to `rows` requests; `first` is the first one's number."""
        if not requests:
            return []
        if self.writes and not self.reads_source:
            return self._continued(requests, rows, seed, max_tokens)
        config = self.config.data
        batch = request_batch(config, requests, rows, self.codecs, first)
        if not self.writes:
            return self._classified(batch, len(requests))
        inputs = self.experiment.placement.for_generation(
            self.run.variables, batch, self.experiment.axes()
        )
        tokens, scores = self._generate(*inputs, np.uint32(seed % 2**32))
        decoded = map(self.codecs["text"].decode, np.asarray(tokens))
        outputs = [Output(t, float(s)) for t, s in zip(decoded, scores, strict=True)]
        return outputs[: len(requests)]

    def _continued(
        self, lines: list[str], rows: int, seed: int, max_tokens: int
    ) -> list[Output]:
        ids, scores = [[] for _ in lines], np.zeros(len(lines))
        stretches = self.continuation(
            self.run.variables, lines, rows, seed % 2**31, max_tokens
        )
        for ids, scores in stretches:  # noqa: B007  (the last one is complete)
            pass
        decoded = map(self.codecs["text"].decode, ids)
        return [Output(t, float(s)) for t, s in zip(decoded, scores, strict=True)]

    def _classified(self, batch: Any, count: int) -> list[Output]:
        experiment = self.experiment
        step = np.int32(self.run.step)
        _, rows = self._eval(self.run.variables, step, experiment.put(batch))
        rows = {k: np.asarray(x)[:count] for k, x in rows.items()}
        if "number" in rows:
            return [Output(label=float(x)) for x in rows["number"]]
        if "probabilities" not in rows:
            raise UserError(
                f"{self.run.path}: model={type(self.config.model).__name__} gives "
                "neither text nor a label; score it with evaluate.py"
            )
        names = self.codecs["label"].names
        outputs = []
        for best, shares in zip(rows["label"], rows["probabilities"], strict=True):
            shown = dict(zip(names, map(float, shares), strict=False))
            outputs.append(Output("", float(shares[best]), names[best], shown))
        return outputs


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


def write_line(sampler: Sampler, line: str, output: Output, scores: bool) -> None:
    """Prints one output in one line."""
    if not sampler.writes:
        text = str(output.label)
    elif sampler.reads_source:
        text = one_line(output.text) if line.strip() else ""
    else:
        text = one_line(line + output.text)
    print(f"{output.score:.4f}\t{text}" if scores else text, flush=True)


def write_live(sampler: Sampler, line: str, seed: int, max_tokens: int) -> None:
    """Prints a prompt and its continuation as it is written."""
    print(line, end="", flush=True)
    shown, tok = "", sampler.codecs["text"]
    stretches = sampler.continuation(
        sampler.run.variables, [line], 1, seed % 2**31, max_tokens
    )
    for (row,), _ in stretches:
        # The last character may be incomplete until the next token.
        text = tok.decode(row).removesuffix("\ufffd")
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def main(argv: list[str]) -> None:
    """One output an input line, or live text of a single prompt."""
    flag = flags.FLAGS
    workdir = launch.folder_flag("workdir")
    given = {n: flag[n].value for n in OVERRIDES if flag[n].value is not None}
    # A setting that only one method reads implies it.
    if {"beam_size", "length_penalty"} & set(given):
        given = {"method": "beam", **given}
    if {"temperature", "top_k", "top_p"} & set(given):
        given = {"method": "sample", **given}
    sampler = Sampler(workdir, flag.checkpoint, **given)
    method = sampler.config.decode.method if sampler.writes else "labels"
    print(f"{workdir}: {sampler.run.which}, {method}", file=sys.stderr)
    lines, rows = read_lines(flag)
    live = sampler.writes and not sampler.reads_source and not flag.scores
    for number, part in enumerate(chunks(lines, rows)):
        seed = flag.seed + number
        if live and len(part) == 1:
            write_live(sampler, part[0], seed, flag.max_tokens)
            continue
        outputs = sampler.answer(part, rows, seed, flag.max_tokens, number * rows)
        for line, output in zip(part, outputs, strict=True):
            write_line(sampler, line, output, flag.scores)


def define() -> None:
    """Defines the flags."""
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


def cli(argv: Sequence[str], program: str = "generate") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, answers=True)


if __name__ == "__main__":
    cli(sys.argv)
