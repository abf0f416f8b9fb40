"""Asks a trained workdir: continues prompts, translates, gives labels, tags, fills.

python generate.py --workdir=runs/transformer_cldr --input="3 May 2024"
cat sentences.txt | python generate.py --workdir=DIR --method=sample --top_p=0.9
python generate.py --workdir=runs/gpt_char --input="ROMEO:" --max_tokens=500
python generate.py --workdir=DIR --input_file=in.csv --output=out.jsonl
python generate.py --workdir=DIR --chat
python generate.py --workdir=runs/dalle_digits --input="a handwritten seven"
    --num_samples=16 --guidance=2 --output=grid.png
python generate.py --workdir=runs/music --input=opening.mid --num_samples=8
    --output=bach.mid
"""

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from absl import flags

from triform.answers import chat, inputs
from triform.answers.inputs import Asked
from triform.answers.music_files import MusicFiles
from triform.answers.output import JsonLines, Output, PictureFile
from triform.answers.sampler import Sampler
from triform.models.decode import METHODS
from triform.runtime import commands, hosts, joining, launch, paths
from triform.runtime.errors import UserError
from triform.runtime.progress import QUIET, Heartbeat, stage

__all__ = ["Output", "PictureFile", "Sampler", "cli", "define", "main"]

FLAGS = (
    *("method", "beam_size", "length_penalty", "temperature", "top_k", "top_p"),
    *("guidance", "repetition_penalty", "no_repeat_ngram"),
)
SAME = (
    *("max_tokens", "num_samples", "seed", "batch_size", "stop", "scores", "strict"),
    *("image", "rerank"),
)
# What a model gives that needs files of its own: its name, their ending, their writer.
FILES = {
    "image": ("images", ".png", PictureFile),
    "music": ("music", ".mid", MusicFiles),
}


def requests(flag: Any) -> tuple[Iterator[Asked], int]:
    """(what is asked, as it comes; how much of it is answered together)."""
    if flag.input is not None and flag.input_file:
        raise UserError("--input and --input_file are both given; set one of them")
    if flag.image:
        if flag.input is None:
            raise UserError(f"--image={flag.image}: give its caption by --input")
        asked = inputs.of_flags(flag.input)
        both = (
            dataclasses.replace(x, value={"text": x.value, "image": flag.image})
            for x in asked
        )
        return both, min(flag.batch_size, len(flag.input))
    if flag.input is not None:
        return inputs.of_flags(flag.input), min(flag.batch_size, len(flag.input))
    if flag.input_file:
        found = [inputs.of_file(path) for path in flag.input_file]  # that all are there
        return itertools.chain.from_iterable(found), flag.batch_size
    if hosts.here().count > 1:
        return inputs.shared(inputs.of_stdin(), flag.batch_size), flag.batch_size
    if sys.stdin is not None and sys.stdin.isatty():
        print("type a line, Ctrl-D to end", file=sys.stderr)
        return inputs.of_stdin(), 1  # answer every line at once
    return inputs.of_stdin(), flag.batch_size


class Report:
    """What standard error says of the answers: warnings, and that it goes on."""

    def __init__(self, path: str, rows: bool, log: TextIO):
        self.path, self.rows, self.log = path, rows, log  # rows hold warnings
        self.answers = self.warned = self.empty = 0

    def __call__(self, asked: Asked, output: Output) -> None:
        """One more answer."""
        self.answers += 1
        if output.warnings:
            self.warned += 1
            nothing = asked_nothing(output)
            self.empty += nothing
            first = self.warned == 1 and not nothing
            if first or (self.path and not self.rows):
                print(f"warning: {asked.where}: {output.warnings[0]}", file=self.log)

    def close(self, written: Sequence[str] = ()) -> None:
        """The counts, and which files are `written`."""
        if self.empty == self.answers:
            what = "every input is empty" if self.answers else "there is no input"
            print(
                f"nothing was asked, {what}: give --input, --input_file or standard "
                "input",
                file=self.log,
            )
        if self.warned > 1:
            where = self.path if self.rows else "--output=FILE.jsonl"
            held = f"; the rows of {where} hold them"
            print(
                f"warning: {self.warned} of {self.answers} answers have warnings"
                f"{held if self.rows or not self.path else ''}",
                file=self.log,
            )
        if self.path:
            files = ", ".join(map(commands.path, written))
            told = f"{files}: {self._counted()}" if files else "no file was written"
            print(told, file=self.log)

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Counts the answers aloud now and then."""
        lead = f"{self.path}: " if self.path else ""
        heart = Heartbeat(lambda: f"{lead}{self._counted()} so far", QUIET, self.log)
        with contextlib.closing(heart):
            yield

    def _counted(self) -> str:
        return f"{self.answers} answer{'s' * (self.answers != 1)}"


def asked_nothing(output: Output) -> bool:
    """Is it the answer to an empty line?"""
    return output.warnings[0].startswith("empty")


def shown(output: Output, scores: bool) -> Iterator[str]:
    """The lines of one answer: one, or one for every sample."""
    for sample in output.samples or [output]:
        text = sample.line()
        yield f"{sample.score:.4f}\t{text}" if scores else text


def write_live(sampler: Sampler, asked: Asked, number: int, options: dict) -> Output:
    """Prints a prompt and its continuation as it is written."""
    *_, output = (
        part if isinstance(part, Output) else print(part, end="", flush=True)
        for part in sampler.live(asked, number=number, **options)
    )
    print(flush=True)
    return output


def answered(
    sampler: Sampler, asked: Iterable[Asked], size: int, options: dict
) -> Iterator[tuple[Asked, Output]]:
    """Every request with its answer."""
    waiting: list[Asked] = []

    def noted() -> Iterator[Asked]:
        for one in asked:
            waiting.append(one)
            yield one

    for output in sampler.stream(noted(), batch_size=size, **options):
        yield waiting.pop(0), output


def check_output(sampler: Sampler, workdir: str, output: str, kind: type) -> None:
    """UserError if what writes --output is not for what the model gives."""
    for field, (name, end, own) in FILES.items():
        given = field in sampler.gives
        if given != (kind is own):
            what = f"gives {'' if given else 'no '}{name}"
            raise UserError(
                f"--output={output}: {workdir} {what}; a file of {name}, and only "
                f"such, ends in {end}; name {'another' if output else 'one'}"
            )


def main(argv: list[str]) -> None:
    """One answer for every input: a line, a row of --output, or live text."""
    flag = flags.FLAGS
    workdir = launch.workdir_flag()
    given = {n: flag[n].value for n in FLAGS if flag[n].value is not None}
    if flag.num_samples > 1:
        given = {"method": "sample", **given}
    group = joining.join(joining.asked("workdir", "checkpoint", *FLAGS, *SAME))
    if flag.system and not flag.chat:
        raise UserError("--system: it begins a conversation; add --chat")
    if flag.chat and group.count > 1:
        raise UserError("--chat: it runs on one process; leave out the others")
    asked, size = requests(flag)
    path = paths.absolute(flag.output) if flag.output else ""
    kind = next((x for _, end, x in FILES.values() if path.endswith(end)), JsonLines)
    file = kind(path, flag.overwrite) if path and group.is_first else None
    rerank = paths.absolute(flag.rerank) if flag.rerank else ""
    log = sys.stderr if group.is_first else sys.stdout  # which says nothing
    with stage(f"opening {workdir}", least=math.inf, file=log):
        sampler = Sampler(workdir, flag.checkpoint, rerank, **given)
    check_output(sampler, workdir, flag.output, kind)
    if flag.input_file:
        asked = inputs.gathered(asked, sampler.kind)
    method = sampler.config.decode.method if sampler.writes else sampler.gives[0]
    print(f"{workdir}: {sampler.run.which}, {method}", file=log)
    options = {
        "seed": flag.seed,
        "max_tokens": flag.max_tokens,
        "num_samples": flag.num_samples,
        "stop": tuple(flag.stop or ()),
        "scores": flag.scores,
        "strict": flag.strict,
    }
    if flag.chat:
        if path or flag.scores or flag.num_samples > 1:
            raise UserError(
                "--chat: it prints one answer for every line; leave out --output, "
                "--scores and --num_samples"
            )
        chat.talk(sampler, asked, options, flag.system)
        return
    if file is not None:
        file.open()
    report = Report(flag.output, kind is JsonLines, log)
    live = sampler.continues and not (path or flag.scores or flag.num_samples > 1)
    live = live and group.count == 1
    if live and size == 1:
        for number, one in enumerate(asked):
            report(one, write_live(sampler, one, number, options))
        report.close()
        return
    # Who answers lines as they are written waits in silence.
    waits = flag.input is None and not flag.input_file and not path
    with contextlib.nullcontext() if waits else report.going_on():
        for one, output in answered(sampler, asked, size, options):
            report(one, output)
            if file is not None:
                file.write({"input": one.repeated(), **output.row(sampler.gives)})
                continue
            for line in shown(output, flag.scores and "score" in sampler.gives):
                print(line, flush=True)
    report.close(file.close() if file is not None else ())


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string("workdir", None, "A workdir of train.py.", required=True)
    flags.DEFINE_multi_string(
        "input",
        None,
        "A text, or the path of an image or of a .mid; repeatable; none: "
        "standard input.",
    )
    flags.DEFINE_multi_string(
        "input_file",
        None,
        "A file with an input a line, a table (JSONL, CSV, TSV, Parquet) with the "
        "columns of training, an image, a .mid, or a folder of such; repeatable.",
    )
    flags.DEFINE_bool(
        "chat", False, "Keep a conversation; a line /reset begins another."
    )
    flags.DEFINE_string("system", "", "What the system says first, with --chat.")
    flags.DEFINE_string(
        "output",
        "",
        "A new file: one JSON object per input, or pictures as .png, or "
        "music as .mid (of several NAME_1.mid and so on, and NAME.png).",
    )
    flags.DEFINE_bool("overwrite", False, "Replace --output if it is there.")
    flags.DEFINE_bool("strict", False, "Refuse an input that would be cut or changed.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, average:K, or a step.")
    flags.DEFINE_integer("batch_size", 32, "Inputs answered together.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 256, "Tokens written, at most.", lower_bound=1)
    flags.DEFINE_multi_string("stop", None, "A text ends before this; repeatable.")
    flags.DEFINE_integer(
        "num_samples", 1, "Texts, pictures or pieces for each input.", lower_bound=1
    )
    flags.DEFINE_string(
        "image", "", "A picture whose upper half is kept, the rest drawn for --input."
    )
    flags.DEFINE_string(
        "rerank", "", "A workdir that scores pairs: of the samples the best come first."
    )
    flags.DEFINE_integer("seed", 0, "Of sampling.")
    flags.DEFINE_bool(
        "scores", False, "Print each score first; the tokens' stand in --output."
    )
    flags.DEFINE_enum("method", None, METHODS, "Instead of the config's decode.method.")
    flags.DEFINE_integer("beam_size", None, "Instead of decode.beam_size.")
    flags.DEFINE_float("length_penalty", None, "Instead of decode.length_penalty.")
    flags.DEFINE_float("temperature", None, "Instead of decode.temperature.")
    flags.DEFINE_integer("top_k", None, "Instead of decode.top_k.")
    flags.DEFINE_float("top_p", None, "Instead of decode.top_p.")
    flags.DEFINE_float("guidance", None, "Instead of decode.guidance.")
    about = "Instead of decode.repetition_penalty."
    flags.DEFINE_float("repetition_penalty", None, about)
    flags.DEFINE_integer("no_repeat_ngram", None, "Instead of decode.no_repeat_ngram.")
    joining.define()


def cli(argv: Sequence[str], program: str = "generate") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, answers=True)


if __name__ == "__main__":
    cli(sys.argv)
