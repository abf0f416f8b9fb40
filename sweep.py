"""Runs one experiment for every combination of some settings, and compares them.

    python sweep.py --config=configs/bert_finetune.py:clinc150 --workdir=DIR \
        --sweep="init_from=RUN," --sweep=seed=0,1,2,3,4 [--config.steps=500 ...]

Each combination is a run of train.py in DIR/NAME, one after the other; started again,
finished ones are skipped and the interrupted one goes on. `seed`, if it is swept, is
what means and standard deviations are taken over. The table is in DIR/sweep.json too.

Exit codes: 0 all finished, 1 a run failed (the others are done), 75 interrupted as
train.py is, the running run saved: start the same command again.
"""

import hashlib
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from triform.runtime import files, launch, metrics, signals
from triform.runtime.errors import UserError

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
# Values that name a folder as they are, whatever the file system makes of capitals.
PLAIN = re.compile(r"[a-z0-9_.+-]{1,40}|True|False")
NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # as metrics.jsonl says


def parse(text: str) -> tuple[str, list[str]]:
    """(key, values) of 'key=a,b,c'; commas within brackets do not separate."""
    key, equals, values = text.partition("=")
    found = re.split(r",(?![^(\[]*[)\]])", values)
    if not (key and equals) or len(found) < 2:
        raise UserError(f"--sweep={text!r}: expected KEY=VALUE,VALUE,...")
    if len(set(found)) < len(found):
        raise UserError(f"--sweep={text!r}: a value stands there twice; remove one")
    return key, found


def combinations(texts: list[str]) -> list[dict[str, str]]:
    """Every combination of all --sweep's values; UserError for a key named twice."""
    swept: dict[str, list[str]] = {}
    for key, values in map(parse, texts):
        if key in swept:
            raise UserError(f"--sweep={key}=...: named twice; put its values into one")
        swept[key] = values
    return [
        dict(zip(swept, x, strict=True)) for x in itertools.product(*swept.values())
    ]


def name_of(settings: dict[str, str]) -> str:
    """A folder's name, another one for other settings: 'seed=0,init_from=run~1f3a9c2e'.

    A value that cannot stand in a name as it is, is shortened and gets its digest.
    """
    text = ",".join(f"{_word(k)}={_word(v)}" for k, v in settings.items())
    return text if len(text) <= 200 else f"{text[:180]}~{_digest(repr(settings))}"


def _word(value: str) -> str:
    if PLAIN.fullmatch(value):
        return value
    last = os.path.basename(value.rstrip("/")) or "none"
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', last)[:24]}~{_digest(value)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:10]


class Runs:
    """Runs train.py, one run at a time; a signal stops the one that runs."""

    def __init__(self) -> None:
        self.requested = ""  # name of the signal
        self._child: subprocess.Popen | None = None
        signals.install(self._request)

    def __call__(
        self, settings: dict[str, str], workdir: str, passed: list[str]
    ) -> int:
        """The exit code of one run, which is shown as it goes."""
        args = [f"--config.{k}={v}" for k, v in settings.items()]
        command = [sys.executable, TRAIN, f"--workdir={workdir}", *passed, *args]
        print(f"== {workdir}", flush=True)
        environment = os.environ | {signals.PARENT: str(os.getpid())}
        self._child = subprocess.Popen(command, env=environment)
        if self.requested:  # it came before there was a child to tell
            self._child.terminate()
        return self._child.wait()

    def _request(self, number: int, frame: Any) -> None:
        # A terminal tells the child too; train.py takes several signals as one.
        self.requested = self.requested or signals.name(number)
        if self._child is not None:
            self._child.terminate()


def last_test(workdir: str) -> dict[str, float]:
    """The numbers of the last test of a run; empty if there is none."""
    lines = [x for x in metrics.read_lines(workdir) if "test/loss" in x]
    found = {k: v for k, v in (lines or [{}])[-1].items() if k.startswith("test/")}
    found = {
        k: NUMBERS.get(v, v) if isinstance(v, str) else v for k, v in found.items()
    }
    return {k: v for k, v in found.items() if isinstance(v, int | float)}


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every combination but for the seed: {metric: (mean, deviation, n)}.

    A mean over runs of which one is infinite or NaN is so too, its deviation is NaN.
    """
    groups: dict[str, list] = {}
    for result in results:
        kept = {k: v for k, v in result["settings"].items() if k != "seed"}
        groups.setdefault(name_of(kept) or "all", []).append(result["test"])
    rows = []
    for name, tests in groups.items():
        scores = {}
        for key in dict.fromkeys(k for t in tests for k in t):
            values = [float(t[key]) for t in tests if key in t]
            spread = math.nan
            if all(map(math.isfinite, values)):
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
            scores[key] = (sum(values) / len(values), spread, len(values))
        rows.append({"name": name, "scores": scores})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Lines of 'name  metric mean +- deviation (runs)'."""
    lines = []
    for row in rows:
        lines.append(row["name"])
        lines += [
            f"  {key:24} {mean:.5g} +- {spread:.2g} ({n} runs)"
            for key, (mean, spread, n) in row["scores"].items()
        ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs all combinations, prints the table; the exit code."""
    flag, workdir = flags.FLAGS, launch.folder_flag("workdir")
    swept = combinations(flag.sweep)
    os.makedirs(workdir, exist_ok=True)
    passed, results, failed = [f"--config={flag.config}", *argv[1:]], [], []
    unwritten = ""  # why sweep.json could not be
    run, report = Runs(), os.path.join(workdir, "sweep.json")
    for settings in swept:
        folder = os.path.join(workdir, name_of(settings))
        code = run(settings, folder, passed)
        if run.requested or code == signals.INTERRUPTED:
            why = run.requested or "a signal"
            print(f"interrupted by {why}: start again to go on", file=sys.stderr)
            return signals.INTERRUPTED
        if code:
            failed.append({"settings": settings, "code": code})
            print(f"error: {folder} ended with code {code}", file=sys.stderr)
        else:
            results.append({"settings": settings, "test": last_test(folder)})
        rows = summarise(results)
        unwritten = ""
        try:
            files.write_json(report, {"runs": results, "failed": failed, "rows": rows})
        except OSError as error:
            unwritten = f"error: {report}: {error.strerror}"
    print(table(summarise(results)))
    if failed:
        print(f"error: {len(failed)} of {len(swept)} runs failed", file=sys.stderr)
    if unwritten:
        print(unwritten, file=sys.stderr)
    return 1 if failed or unwritten else 0


def define() -> None:
    """Defines the flags; those of train.py are passed on to it."""
    about = "As for train.py; a workdir: its config."
    flags.DEFINE_string("config", None, about, required=True)
    flags.DEFINE_string("workdir", None, "Holds a folder a run.", required=True)
    flags.DEFINE_multi_string("sweep", None, "KEY=VALUE,VALUE,...", required=True)


def cli(argv: Sequence[str], program: str = "sweep") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, passes_on=True)


if __name__ == "__main__":
    cli(sys.argv)
