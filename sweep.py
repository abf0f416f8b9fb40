"""Runs one experiment for every combination of some settings, and compares them.

    python sweep.py --config=configs/bert_finetune.py:clinc150 --workdir=DIR \
        --sweep="init_from=RUN," --sweep=seed=0,1,2,3,4 [--config.steps=500 ...]

Each combination is a run of train.py in DIR/NAME, one after the other; started again,
finished ones are skipped and the interrupted one goes on. `seed`, if it is swept, is
what means and standard deviations are taken over. The table is in DIR/sweep.json too.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from triform.runtime import launch, metrics

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")


def parse(text: str) -> tuple[str, list[str]]:
    """(key, values) of 'key=a,b,c'; commas within brackets do not separate."""
    key, equals, values = text.partition("=")
    found = re.split(r",(?![^(\[]*[)\]])", values)
    if not (key and equals) or len(found) < 2:
        raise ValueError(f"--sweep={text!r}: expected KEY=VALUE,VALUE,...")
    return key, found


def name_of(settings: dict[str, str]) -> str:
    """A folder's name: 'seed=0,init_from=run'."""
    text = ",".join(
        f"{k.rpartition('.')[2]}={os.path.basename(v.rstrip('/')) or 'none'}"
        for k, v in settings.items()
    )
    return re.sub(r"[^\w=.,+-]+", "_", text)


def run(settings: dict[str, str], workdir: str, passed: list[str]) -> int:
    """One run of train.py, shown as it goes; its exit code."""
    args = [f"--config.{k}={v}" for k, v in settings.items()]
    print(f"== {workdir}", flush=True)
    command = [sys.executable, TRAIN, f"--workdir={workdir}", *passed, *args]
    return subprocess.run(command, check=False).returncode


def last_test(workdir: str) -> dict[str, float]:
    """The numbers of the last test of a run; empty if there is none."""
    lines = [x for x in metrics.read_lines(workdir) if "test/loss" in x]
    last = lines[-1] if lines else {}
    return {
        k: v
        for k, v in last.items()
        if k.startswith("test/") and isinstance(v, int | float)
    }


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every combination but for the seed: {metric: (mean, deviation, n)}."""
    groups: dict[str, list] = {}
    for result in results:
        kept = {k: v for k, v in result["settings"].items() if k != "seed"}
        groups.setdefault(name_of(kept) or "all", []).append(result["test"])
    rows = []
    for name, tests in groups.items():
        scores = {}
        for key in tests[0]:
            values = [t[key] for t in tests if key in t]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            scores[key] = (statistics.fmean(values), spread, len(values))
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
    """Runs all combinations, prints the table; 1 if a run failed."""
    flag = flags.FLAGS
    try:
        swept = dict(parse(text) for text in flag.sweep)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    passed, results = [f"--config={flag.config}", *argv[1:]], []
    for values in itertools.product(*swept.values()):
        settings = dict(zip(swept, values, strict=True))
        workdir = os.path.join(flag.workdir, name_of(settings))
        if code := run(settings, workdir, passed):
            print(f"error: {workdir} ended with code {code}", file=sys.stderr)
            return code
        results.append({"settings": settings, "test": last_test(workdir)})
        rows = summarise(results)
        with open(os.path.join(flag.workdir, "sweep.json"), "w") as f:
            json.dump({"runs": results, "rows": rows}, f, indent=2)
    print(table(rows))
    return 0


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
