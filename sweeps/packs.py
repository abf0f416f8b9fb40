"""Runs that train together in one process: what differs is an input of one program."""

import os
import subprocess
import sys
import time

from triform.runtime import files, history, signals
from triform.runtime.errors import UserError
from triform.sweeps import runs
from triform.sweeps.local import Stop, interrupted
from triform.sweeps.runs import Member, Sweep

FILE = "packed.json"  # of a sweep's workdir: the runs that are asked for
LOOK = 0.1  # seconds between two looks at the process


def at_most(where: str) -> int:
    """Runs at once that --on=packed:N allows; 0: no limit. UserError for no number."""
    if where and not (where.isdecimal() and int(where) > 0):
        raise UserError(f"--on=packed:{where}: expected a number of runs at once")
    return int(where or 0)


def run(sweep: Sweep, todo: list[Member], where: str, stop: Stop) -> str:
    """Does these runs in one process; what came of each its folder says."""
    path = os.path.join(sweep.workdir, FILE)
    tree = [
        {"workdir": x.folder, "config": sweep.base, "flags": sweep.settings_of(x)}
        for x in todo
    ]
    files.write_json(path, tree)
    starts = {x.folder: len(history.read(x.folder)) for x in todo}
    begin = {x.folder: _size(x) for x in todo}
    command = [sys.executable, "-m", "triform.packed", path, str(at_most(where))]
    environment = os.environ | {signals.PARENT: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, cwd=sweep.cwd)
    stop.told = lambda again: process.terminate()
    if stop():  # it came before
        process.terminate()
    while process.poll() is None:
        time.sleep(LOOK)
    code = process.returncode
    for member in todo if code else ():
        begun = len(history.read(member.folder)) > starts[member.folder]
        if interrupted(code, bool(stop()), begun):
            continue
        if runs.status_of(member).state == "unfinished":
            error = runs.error_in(_output(member, begin), code)
            runs.record(member.folder, f"error: {error}", starts[member.folder])
    return ""


def _size(member: Member) -> int:
    path = os.path.join(member.folder, runs.OUTPUT)
    return os.path.getsize(path) if os.path.exists(path) else 0


def _output(member: Member, begin: dict[str, int]) -> str:
    """What a run has printed since."""
    path = os.path.join(member.folder, runs.OUTPUT)
    if not os.path.exists(path):
        return ""
    with open(path, "rb") as f:
        f.seek(begin[member.folder])
        return f.read().decode(errors="replace")
