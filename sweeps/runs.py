"""The runs of a sweep: what each is, and what became of it, read from its folder alone.

A sweep's workdir holds a folder per run; config/, which is common to all: a config file
may be edited while runs wait; and sweep.json: the settings of each run, and the results
when it was last written. Whether a run lives or is
done is never taken from there, but from the run's own folder: its lock, its metrics,
and how its last start ended (runs.jsonl).
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from triform.runtime import files, history, metrics
from triform.runtime.errors import UserError
from triform.sweeps.values import SEED, Range, Search, Settings, name_of

FILE = "sweep.json"
OUTPUT = "output.log"  # of a run's process, in its folder
PRUNED = "pruned"
NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # as metrics.jsonl says


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    settings: Settings
    folder: str  # its workdir
    steps: int  # that it is to do

    @property
    def name(self) -> str:
        """Of its folder."""
        return os.path.basename(self.folder)


@dataclass(frozen=True)
class Status:
    """What became of a run."""

    state: str  # unfinished, running, finished, failed or pruned
    step: int = 0  # the last one with metrics
    note: str = ""  # the error of a failed run, why another was pruned


@dataclass
class Sweep:
    """A sweep: its runs, and what is common to them."""

    workdir: str
    config: str  # --config of all runs, from which `base` was made
    arguments: list[str]  # further flags of all runs, from which it was made, too
    cwd: str  # where relative paths start
    steps: int  # of runs that do not set them
    metric: str  # by which runs are compared, of evaluations: eval/loss
    mode: str  # which values of it are better: min or max
    jobs: int = 0  # runs at a time; 0: not said
    prune: bool = False  # stop runs that are worse than half of the others
    members: list[Member] = field(default_factory=list)
    search: Search | None = None
    # Settings of runs in the workdir that are no longer asked for.
    others: list[Settings] = field(default_factory=list)

    def member(self, settings: Settings) -> Member:
        """The run with these settings."""
        steps = settings.get("steps", str(self.steps))
        steps = int(steps, 0 if "x" in steps else 10)  # as the flag takes it
        folder = os.path.join(self.workdir, name_of(settings))
        return Member(settings, folder, steps)

    @property
    def base(self) -> str:
        """The config of all runs, as it was when the sweep was started."""
        return os.path.join(self.workdir, "config")

    def flags(self, member: Member) -> list[str]:
        """The flags of train.py for a run."""
        common = [f"--workdir={member.folder}", f"--config={self.base}"]
        return [*common, *self.settings_of(member)]

    def settings_of(self, member: Member) -> list[str]:
        """Those of them that say what is other than in the config."""
        return [f"--config.{k}={v}" for k, v in member.settings.items()]

    def better(self, a: float, b: float) -> bool:
        """Is a value of the metric better than another? NaN is worse than all."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.mode == "max" else a < b


# sweep.json


def write(sweep: Sweep) -> None:
    """Replaces sweep.json: the definition, and what the runs' folders say now."""
    tree = {
        key: getattr(sweep, key)
        for key in ("config", "arguments", "cwd", "steps", "metric", "mode", "jobs")
    }
    tree |= {"prune": sweep.prune, "search": None, "runs": rows_of(sweep)}
    if sweep.search is not None:
        tree["search"] = dataclasses.asdict(sweep.search)
    tree |= {"rows": summarise(tree["runs"]), "others": sweep.others}
    files.write_json(os.path.join(sweep.workdir, FILE), tree)


def read(workdir: str) -> Sweep | None:
    """The sweep of a workdir; None if there is none. UserError if it is damaged."""
    path = os.path.join(workdir, FILE)
    text = files.read_text(path)
    if text is None:
        return None
    try:
        tree = json.loads(text)
        names = ("config", "arguments", "cwd", "steps", "metric", "mode", "jobs")
        sweep = Sweep(workdir, **{key: tree[key] for key in names}, prune=tree["prune"])
        sweep.members = [sweep.member(run["settings"]) for run in tree["runs"]]
        sweep.others = tree["others"]
        if found := tree["search"]:
            space = {
                key: Range(**axis) if isinstance(axis, dict) else tuple(axis)
                for key, axis in found["space"].items()
            }
            sweep.search = Search(space, found["trials"], tuple(found["seeds"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no sweep of this version of Triform ({error!r}); remove the file "
            "and start the sweep again: its runs are found by their names"
        ) from error
    return sweep


def rows_of(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a run: its name, settings, state, best evaluation and test scores."""
    rows = []
    for member in sweep.members:
        lines = metrics.read_lines(member.folder)
        status = status_of(member, lines)
        row = {"name": member.name, "settings": member.settings}
        row |= {"state": status.state, "step": status.step, "note": status.note}
        best = best_of(_curve(lines, sweep.metric), sweep)
        row["best"] = {} if best is None else {sweep.metric: best}
        done = status.state == "finished"
        row["test"] = _test(lines) if done else {}
        rows.append(row)
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every combination but for the seed: {metric: (mean, deviation, n)}.

    Of finished runs. A mean over runs of which one is infinite or NaN is so too, its
    deviation is NaN.
    """
    groups: dict[str, tuple[Settings, list]] = {}
    for row in rows:
        if row["state"] == "finished":
            kept = {k: v for k, v in row["settings"].items() if k != SEED}
            group = groups.setdefault(name_of(kept) or "all", (kept, []))
            group[1].append(row["best"] | row["test"])
    found = []
    for name, (settings, tests) in groups.items():
        scores = {}
        for key in dict.fromkeys(k for t in tests for k in t):
            values = [float(t[key]) for t in tests if key in t]
            spread = math.nan
            if all(map(math.isfinite, values)):
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
            scores[key] = (sum(values) / len(values), spread, len(values))
        found.append({"name": name, "settings": settings, "scores": scores})
    return found


def ranked(rows: list[dict[str, Any]], sweep: Sweep) -> list[dict[str, Any]]:
    """Rows of `summarise`, the best first by the sweep's metric."""

    def key(row: dict[str, Any]) -> tuple[bool, float]:
        mean = row["scores"].get(sweep.metric, (math.nan,))[0]
        return math.isnan(mean), -mean if sweep.mode == "max" else mean

    return sorted(rows, key=key)


# One run


def held(folder: str) -> bool:
    """Does a process hold the lock of this workdir?"""
    try:
        file = open(os.path.join(folder, ".lock"), "rb")  # noqa: SIM115  (closed below)
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def status_of(member: Member, lines: list[dict[str, Any]] | None = None) -> Status:
    """What became of a run; `lines` are its metrics, if they are read already."""
    lines = metrics.read_lines(member.folder) if lines is None else lines
    step = max((line["step"] for line in lines), default=0)
    tests = [line["step"] for line in lines if "test/loss" in line]
    if max(tests, default=-1) >= member.steps:
        return Status("finished", step)
    starts = history.read(member.folder)
    outcome = starts[-1].get("outcome") if starts else None
    # The lock is asked for only if the last start has not ended.
    if outcome is None and held(member.folder):
        return Status("running", step)
    kind, _, note = (outcome or "").partition(": ")
    state = {"error": "failed", PRUNED: PRUNED}.get(kind, "unfinished")
    return Status(state, step, "" if state == "unfinished" else note)


def _test(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers of the last test of a run; empty if there is none."""
    lines = [line for line in lines if "test/loss" in line]
    found = {k: v for k, v in (lines or [{}])[-1].items() if k.startswith("test/")}
    found = {k: _number(v) for k, v in found.items()}
    return {k: v for k, v in found.items() if v is not None}


def curve_of(folder: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in a run, by step."""
    return _curve(metrics.read_lines(folder), metric)


def _curve(lines: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    found = {x["step"]: _number(x[metric]) for x in lines if metric in x}
    return sorted((step, y) for step, y in found.items() if y is not None)


def best_of(curve: Sequence[tuple[int, float]], sweep: Sweep) -> float | None:
    """The best value of a curve; None if it has none."""
    best = None
    for _, value in curve:
        if best is None or sweep.better(value, best):
            best = value
    return best


def _number(value: Any) -> float | None:
    value = NUMBERS.get(value, value) if isinstance(value, str) else value
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known else None


# How a start ended that could not say so itself


@contextlib.contextmanager
def locked(folder: str) -> Iterator[bool]:
    """Holds the lock of a folder meanwhile; False if another process has it."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:  # what is in it stays
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def record(folder: str, outcome: str, starts: int, command: str = "") -> None:
    """Writes to runs.jsonl how a start ended, unless it has said so itself.

    `starts`: lines that were there before it. A start that failed before it had a line
    gets one. Nothing is written while another process runs in the folder. What the
    caller knows better is replaced: a run that was pruned said that it was interrupted.
    """
    with locked(folder) as ours:
        if not ours:
            return
        lines = history.read(folder)
        if len(lines) <= starts:
            lines.append({"started": history.now(), "outcome": None})
            lines[-1] |= {"command": command}
        said = lines[-1].get("outcome")
        if not (said or "").startswith("error"):
            lines[-1] |= {"ended": history.now(), "outcome": outcome}
            with files.replacing(history.path_of(folder)) as f:
                f.writelines(files.dumps(line) + "\n" for line in lines)


def error_in(output: str, code: int) -> str:
    """The line that says why a run failed, from what it printed and its exit code."""
    if code == 0:
        return "ended without scores of the test split"
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        memory = "; was there memory enough?" if number == 9 else ""
        return f"ended by signal {number}{memory}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"error: ", line)]
    if told:
        return told[-1].removeprefix("error: ")
    return lines[-1] if lines else f"ended with code {code}"
