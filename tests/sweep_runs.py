"""A program in place of train.py that takes no time to start, and sweeps of it.

Its settings have real keys and other meanings: optim.learning_rate is the loss,
optim.warmup_steps how it ends (see TRAIN; without it, seed 13 fails), log_every how
long it takes, in milliseconds.
"""

import os
import pathlib
import subprocess
import sys
import time

from triform.sweeps.runs import Sweep

CONFIG = "gpt_shakespeare_char:smoke"
STEPS = 6
SAVES, FAILS, BREAKS, DIES, SAVES_LONG = range(5)  # optim.warmup_steps
TRAIN = """
import fcntl, json, os, signal, sys, time
from triform.runtime.signals import INTERRUPTED, Interrupt
flags = dict(x[2:].partition("=")[::2] for x in sys.argv[1:])
bad = "1" if flags.get("config.seed") == "13" else "0"
ends = flags.get("config.optim.warmup_steps", bad)
folder = flags["workdir"]
lock = open(os.path.join(folder, ".lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
stop = Interrupt()
stop.listening = True
def note(name, text, how="w"):
    with open(os.path.join(folder, name), how) as f:
        f.write(text)
def measure(step, **scores):
    line = {"step": step, "time": time.time(), **scores}
    note("metrics.jsonl", json.dumps(line) + "\\n", "a")
note("pid", str(os.getpid()))
note("starts", ".", "a")
note("cores", " ".join(map(str, sorted(os.sched_getaffinity(0)))))
loss = flags.get("config.optim.learning_rate", "1.0")
loss = loss if loss == "inf" else float(loss)
print("step 2/6", flush=True)
measure(2, **{"eval/loss": loss})
try:  # what is common to all runs
    with open(os.path.join(flags["config"], "config.json")) as f:
        base = json.load(f)
except FileNotFoundError:
    base = {"log_every": 0, "optim": {"warmup_steps": 0}}
end = time.time() + float(flags.get("config.log_every", base["log_every"])) / 1000
while time.time() < end and not stop():
    time.sleep(0.01)
if stop():
    # Longer than subprocess.run waits.
    time.sleep(2.5 if ends == "4" else 0.5)
    note("saved", stop())
    sys.exit(INTERRUPTED)
if ends == "1":
    print("error: optim.warmup_steps=1: not today; take another", file=sys.stderr)
    sys.exit(1)
if ends == "2":
    raise ValueError("of the program")
if ends == "3":
    os.kill(os.getpid(), signal.SIGKILL)
measure(6, **{"eval/loss": loss})
measure(6, **{"test/loss": loss})
"""
LAUNCH = (
    "import sys; from triform.sweeps import local; local.TRAIN = sys.argv.pop(1); "
    "from triform import sweep; sweep.cli(sys.argv)"
)


def program(folder: pathlib.Path) -> str:
    """The path of the program, written there."""
    path = folder / "train.py"
    path.write_text(TRAIN)
    return str(path)


def sweep_of(workdir: pathlib.Path, plan: list, **fields) -> Sweep:
    """A sweep of the program."""
    workdir.mkdir(exist_ok=True)
    arguments, cwd = [], os.getcwd()
    sweep = Sweep(
        str(workdir), CONFIG, arguments, cwd, STEPS, "eval/loss", "min", **fields
    )
    sweep.members = [sweep.member(settings) for settings in plan]
    return sweep


def started(folder: pathlib.Path, *args: str) -> subprocess.Popen:
    """sweep.py of the program, in a session of its own as a terminal has it."""
    command = [sys.executable, "-c", LAUNCH, program(folder), f"--config={CONFIG}"]
    return subprocess.Popen(
        [*command, f"--workdir={folder / 'out'}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pid_of(folder: pathlib.Path) -> int:
    """The process of a run, once it has begun."""
    path = folder / "pid"
    for _ in range(6000):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"{folder}: the run did not start")


def starts_of(folder: pathlib.Path) -> int:
    """How often a run was started."""
    path = folder / "starts"
    return len(path.read_text()) if path.exists() else 0


def left(folder: pathlib.Path) -> list[int]:
    """Processes, no zombies, whose command line names the folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and state != "Z":
            found.append(int(path.name))
    return found


def gone(folder: pathlib.Path) -> bool:
    """Whether no process of the folder is left, within ten seconds."""
    for _ in range(1000):
        if not left(folder):
            return True
        time.sleep(0.01)
    return False
