"""Runs on this machine: one process a run, several at a time."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from triform.runtime import commands, history, signals
from triform.runtime.errors import UserError
from triform.runtime.progress import NEWS
from triform.sweeps import pruning, runs
from triform.sweeps.runs import Member, Sweep

TRAIN = os.path.join(commands.ROOT, "train.py")
LOOK = 0.1  # seconds between two looks at the processes
PRUNE = 5.0  # seconds between two looks at the metrics


class Stop:
    """Says why to leave, '' to go on: the name of the first signal that came."""

    def __init__(self) -> None:
        self.requested = ""
        # Passes signals on to programs, which save for the first one, and leave at once
        # for a further one (runtime/signals.py): called with whether it is one.
        self.told: Callable[[bool], object] = lambda again: None
        self._since = 0.0
        signals.install(self._request)

    def __call__(self) -> str:
        """The signal's name, '' before one came."""
        return self.requested

    def _request(self, number: int, frame: Any) -> None:
        now, again = time.monotonic(), bool(self.requested)
        if again and now - self._since <= 1:
            return
        if not again:
            self.requested, self._since = signals.name(number), now
        # Now: a terminal tells the programs, too, and what came later than a second
        # after that would be a further signal.
        self.told(again)


class Queue(Protocol):
    """Where the next run comes from."""

    def next(self) -> Member | None:
        """A run to start; None if there is none now."""

    def ended(self, member: Member) -> None:
        """A run has ended: its folder says how."""


class Listed:
    """A queue of given runs."""

    def __init__(self, members: Iterable[Member], sweep: Sweep) -> None:
        self._members, self._sweep = iter(members), sweep

    def next(self) -> Member | None:
        """The next one of the list."""
        return next(self._members, None)

    def ended(self, member: Member) -> None:
        """Brings sweep.json up to date, if it can be written."""
        with contextlib.suppress(OSError):  # it is written again at the end
            runs.write(self._sweep)


class Alone(Listed):
    """A queue of one run, of a sweep that others write sweep.json of."""

    def __init__(self, member: Member) -> None:
        self._members = iter([member])

    def ended(self, member: Member) -> None:
        """Its folder says all."""


# The share of a machine


@dataclass(frozen=True)
class Share:
    """What one of several runs at a time has of the machine."""

    cores: frozenset[int] = frozenset()  # empty: all
    environment: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Processes that are started meanwhile have these cores only.

        XLA makes as many threads as its process may use cores.
        """
        if not self.cores or not hasattr(os, "sched_setaffinity"):
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Without starting JAX, which would take their memory.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "cuda")
    if not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [x for x in visible.split(",") if x]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "-L"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [x for x in listed.stdout.splitlines() if x.startswith("GPU ")]
    return [str(i) for i in range(len(found))]


def shares(jobs: int) -> list[Share]:
    """The machine in so many equal shares.

    Each has its own cores and GPUs. With more runs than GPUs, runs share one, and its
    memory in equal parts; with more runs than cores, they share cores.
    """
    if jobs == 1:
        return [Share()]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    devices = gpus()
    if not devices and any(x.startswith("accel") for x in os.listdir("/dev")):
        raise UserError(f"--jobs={jobs}: runs cannot share TPUs; leave it out")
    found = []
    for index in range(jobs):
        environment = {}
        if devices:
            mine = _part(devices, index, jobs)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            if jobs > len(devices):
                beside = -(-jobs // len(devices))
                fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
                environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = fraction or (
                    f"{0.9 / beside:.3f}"
                )
        found.append(Share(frozenset(_part(cores, index, jobs)), environment))
    return found


def _part(things: list, index: int, parts: int) -> list:
    """Part `index` of a list; of a list that is too short, one thing."""
    if len(things) < parts:
        return [things[index % len(things)]] if things else []
    count = len(things)
    return things[index * count // parts : (index + 1) * count // parts]


# The processes


@dataclass
class _Process:
    """A run that is going on."""

    member: Member
    share: Share
    command: list[str]
    process: subprocess.Popen
    starts: int  # lines of runs.jsonl before it
    begin: int  # where its output begins in its file
    shown: int  # how far that was printed
    pruned: str = ""  # why it was asked to leave
    asked: bool = False  # to leave

    @property
    def output(self) -> str:
        """The file of its output."""
        return os.path.join(self.member.folder, runs.OUTPUT)


def run(sweep: Sweep, todo: list[Member], stop: Stop) -> None:
    """Does these runs, `sweep.jobs` at a time; what came of each its folder says.

    Once `stop()` is not empty, the running ones are asked to leave, and no others are
    started. Returns when no process is left.
    """
    work(sweep, Listed(todo, sweep), stop)


def work(sweep: Sweep, queue: Queue, stop: Stop) -> None:
    """As `run`, with the runs of a queue."""
    free, running = shares(max(sweep.jobs, 1)), []
    prefixed, looked = len(free) > 1, time.monotonic()
    stop.told = lambda again: [_ask_to_leave(one, again) for one in running]
    try:
        while True:
            while free and not stop() and (member := queue.next()):
                running.append(_start(sweep, member, free.pop(0)))
            if not running:
                return
            if stop():
                for one in running:
                    _ask_to_leave(one)
            elif sweep.prune and time.monotonic() - looked > PRUNE:
                looked = time.monotonic()
                _prune(sweep, running)
            for one in [*running]:
                ended = one.process.poll() is not None
                _show(one, prefixed)
                if ended:
                    running.remove(one)
                    free.append(one.share)
                    _settle(one)
                    queue.ended(one.member)
            time.sleep(LOOK)
    finally:
        for one in running:  # after an error of ours: nothing stays behind
            _ask_to_leave(one)
        for one in running:
            one.process.wait()


def _prune(sweep: Sweep, running: list["_Process"]) -> None:
    for one in running:
        one.pruned = one.pruned or pruning.reason(one.member, sweep)
        if one.pruned:
            _ask_to_leave(one)


def _start(sweep: Sweep, member: Member, share: Share) -> _Process:
    os.makedirs(member.folder, exist_ok=True)
    command = [sys.executable, TRAIN, *sweep.flags(member)]
    environment = os.environ | share.environment
    environment |= {signals.PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    path = os.path.join(member.folder, runs.OUTPUT)
    starts = len(history.read(member.folder))
    print(f"== {member.name}", flush=True)
    # A file, not a pipe: the run must not depend on who reads.
    with open(path, "ab") as output, share.taken():
        begin = output.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=sweep.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return _Process(member, share, command, process, starts, begin, begin)


def _ask_to_leave(one: _Process, again: bool = False) -> None:
    # A terminal tells the process too; train.py takes several signals as one. Once: a
    # program that is about to exit has no handler any more, and would die of another.
    if again or not one.asked:
        one.asked = True
        one.process.terminate()


def _show(one: _Process, prefixed: bool) -> None:
    """Prints the lines that a run has written since; with a prefix only some."""
    with open(one.output, "rb") as f:
        f.seek(one.shown)
        new = f.read()
    if one.process.returncode is None:
        new = new[: new.rfind(b"\n") + 1]
    one.shown += len(new)
    lead = f"{one.member.name} | " if prefixed else ""
    for line in new.decode(errors="replace").splitlines():
        if not prefixed or NEWS.match(line):
            print(f"{lead}{line}")
    sys.stdout.flush()


def interrupted(code: int, asked: bool, begun: bool) -> bool:
    """Did a program that ended with this code leave because it was asked to?

    Until it has `begun`, which runs.jsonl says, it may leave in any way.
    """
    died = code in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT)
    return code == signals.INTERRUPTED or (asked and (died or not begun))


def _settle(one: _Process) -> None:
    """Writes down how a run ended that could not do so, and says it."""
    code, member = one.process.returncode, one.member
    if code == 0 and runs.status_of(member).state == "finished":
        return
    begun = len(history.read(member.folder)) > one.starts
    if interrupted(code, one.asked, begun):
        if one.pruned:
            runs.record(member.folder, f"{runs.PRUNED}: {one.pruned}", one.starts)
            print(f"{member.name}: pruned, {one.pruned}", flush=True)
        return
    with open(one.output, "rb") as f:
        f.seek(one.begin)
        text = f.read().decode(errors="replace")
    error = runs.error_in(text, code)
    runs.record(member.folder, f"error: {error}", one.starts, shlex.join(one.command))
    print(f"error: {member.name}: {error}", file=sys.stderr, flush=True)


def show(sweep: Sweep, todo: list[Member]) -> str:
    """The commands of these runs, one a line."""
    lines = [shlex.join([*commands.start("train"), *sweep.flags(x)]) for x in todo]
    return "\n".join(lines)
