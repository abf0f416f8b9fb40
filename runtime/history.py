"""runs.jsonl of a workdir: one line per start, and how it ended.

The line is there from the start on. What was killed could not complete its line: the
next start does.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax

from triform.runtime import files, hosts
from triform.runtime.launch import one_line
from triform.runtime.signals import INTERRUPTED

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARIES = ("triform", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def path_of(workdir: str) -> str:
    """Where the lines of a workdir are."""
    return os.path.join(workdir, "runs.jsonl")


def read(workdir: str) -> list[dict[str, Any]]:
    """The starts of a workdir, oldest first; without lines that a kill has torn."""
    found = []
    for line in (files.read_text(path_of(workdir), "replace") or "").split("\n"):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def now() -> str:
    """'2026-01-31T12:00:00+00:00'."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> tuple[str | None, bool | None]:
    """(commit of this code, whether its tracked files are as committed).

    (None, None) if it is not a checkout, or git cannot tell.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if not os.path.samefile(git("rev-parse", "--show-toplevel"), ROOT):
            return None, None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD"), not changed
    except (OSError, subprocess.SubprocessError):
        return None, None


def versions() -> dict[str, str]:
    """Python's and those of the libraries that decide numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return found


class Start:
    """A line of runs.jsonl, written on entering and completed on leaving.

    The caller holds the lock of the workdir. `outcome`, if it is set, says how the
    start ended; else it is 'finished', or the error that ended it.
    """

    def __init__(self, workdir: str):
        self.workdir, self.outcome = workdir, ""
        self._writes = hosts.here().is_first
        devices, (code, clean) = jax.devices(), commit()
        self.line: dict[str, Any] = {
            "started": now(),
            "ended": None,
            "outcome": None,
            "command": shlex.join(sys.orig_argv),
            "folder": os.getcwd(),
            "commit": code,
            "clean": clean,
            "versions": versions(),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "host": platform.node(),
            "processes": hosts.here().count,
        }

    def __enter__(self) -> "Start":
        if not self._writes:
            return self
        lines = read(self.workdir)
        for line in lines:
            if line.get("outcome") is None:
                line["outcome"] = "killed"
        self._write([*lines, self.line])
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        outcome = self.outcome or "finished"
        if isinstance(error, Exception):
            shown = one_line(error) or f"{type(error).__name__}: {error}"
            outcome = f"error: {shown.splitlines()[0]}"
        elif error is not None:
            outcome = f"interrupted by {type(error).__name__}"
        # A disk that is full must not hide why the run ended, or that it finished.
        with contextlib.suppress(OSError):
            self.end(outcome)

    def end(self, outcome: str) -> None:
        """Completes the line."""
        if not self._writes:
            return
        self.line |= {"ended": now(), "outcome": outcome}
        self._write([*read(self.workdir)[:-1], self.line])

    def interrupted(self, came: str) -> None:
        """Completes the line, and ends the other processes: a signal ends this one."""
        self.end(f"interrupted by {came}")
        hosts.here().leave_at_once(f"{came} before the first step", INTERRUPTED)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with files.replacing(path_of(self.workdir)) as f:
            f.writelines(files.dumps(line) + "\n" for line in lines)
