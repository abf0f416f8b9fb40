"""Signals: one that asks a program to leave lets it save; sweep.py passes it on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from triform.runtime import signals
from triform.runtime.errors import UserError
from triform.sweep import combinations, name_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Does steps until it is told to stop, then "saves" for a moment.
PROGRAM = """
import signal, sys, time
from triform.runtime.signals import INTERRUPTED, Interrupt
if "nohup" not in sys.argv:  # under which these tests may run themselves
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
stop = Interrupt()
stop.listening = "listening" in sys.argv
print("ready", flush=True)
while not stop():
    time.sleep(0.01)
time.sleep(SAVING)
open(sys.argv[1], "w").write(stop())
sys.exit(INTERRUPTED)
"""


def started(tmp_path, *args, before=(), saving=0.3):
    code = PROGRAM.replace("SAVING", str(saving))
    program = [sys.executable, "-c", code, str(tmp_path / "saved"), *args]
    process = subprocess.Popen(
        [*before, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def saved(tmp_path):
    path = tmp_path / "saved"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("name", signals.SAVING)
def test_every_signal_saves_and_several_are_as_one(name, tmp_path):
    process = started(tmp_path, "listening")
    for each in (name, name, "SIGTERM", "SIGHUP", "SIGINT"):
        process.send_signal(getattr(signal, each))
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == signals.INTERRUPTED == 75
    assert saved(tmp_path) in (name, "SIGTERM", "SIGHUP", "SIGINT")
    assert errors.count("saving before leaving") == 1


@pytest.mark.parametrize("second", ["SIGTERM", "SIGUSR1"])
def test_one_more_after_a_second_ends_it_at_once(second, tmp_path):
    """The program saves for ever, so to say."""
    process = started(tmp_path, "listening", saving=60)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    begun = time.monotonic()
    process.send_signal(getattr(signal, second))
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert process.returncode == signals.INTERRUPTED
    assert f"{second} again: leaving at once" in errors
    assert not saved(tmp_path)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    process = started(tmp_path)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGHUP before the first step" in errors
    assert not saved(tmp_path)


def test_a_program_under_nohup_goes_on(tmp_path):
    ignored = ["bash", "-c", 'trap "" HUP; exec "$@"', "nohup"]
    process = started(tmp_path, "listening", "nohup", before=ignored)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)
    assert saved(tmp_path) == "SIGTERM"


def test_a_terminal_that_is_gone_does_not_keep_it_from_saving(tmp_path):
    process = started(tmp_path, "listening")
    process.stderr.close()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 75
    assert saved(tmp_path) == "SIGHUP"


# Sweeps: with a program in place of train.py that takes no time to start.

TRAIN = """
import json, os, sys, time
from triform.runtime.signals import INTERRUPTED, Interrupt
stop = Interrupt()
stop.listening = True
flags = dict(x[2:].partition("=")[::2] for x in sys.argv[1:])
os.makedirs(flags["workdir"], exist_ok=True)
def note(name, text):
    with open(os.path.join(flags["workdir"], name), "w") as f:
        f.write(text)
note("pid", str(os.getpid()))
end = time.time() + float(flags.get("config.seconds", 0))
while time.time() < end and not stop():
    time.sleep(0.01)
if stop():
    time.sleep(0.5)  # longer than subprocess.run waits
    note("saved", stop())
    sys.exit(INTERRUPTED)
if flags.get("config.fails") == "1":
    sys.exit(1)
line = {"step": 1, "test/loss": flags.get("config.loss", 1.0)}
if line["test/loss"] != "inf":
    line["test/loss"] = float(line["test/loss"])
note("metrics.jsonl", json.dumps(line) + "\\n")
"""


@pytest.fixture
def sweep(tmp_path):
    """(flags of sweep.py) -> the process, a group of its own."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    # In place of the real one beside it.
    launcher = tmp_path / "sweep.py"
    launcher.write_text((ROOT / "sweep.py").read_text())
    begun = []

    def start(*args):
        command = [sys.executable, str(launcher), "--config=none"]
        process = subprocess.Popen(
            [*command, f"--workdir={tmp_path / 'out'}", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def child_of(tmp_path, name):
    path = tmp_path / "out" / name / "pid"
    for _ in range(3000):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError("the run did not start")


def gone(pid):
    for _ in range(1000):
        try:
            state = (
                pathlib.Path(f"/proc/{pid}/stat")
                .read_text()
                .rpartition(")")[2]
                .split()[0]
            )
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("SIGTERM to the sweep", 75),
        ("SIGINT to all", 75),
        ("SIGTERM to all", 75),
        ("SIGKILL to the sweep", -9),
    ],
)
def test_a_sweep_that_is_stopped_saves_its_run_and_leaves_none(
    how, code, sweep, tmp_path
):
    process = sweep("--sweep=seed=0,1", "--config.seconds=60")
    child = child_of(tmp_path, "seed=0")
    name, _, whom = how.partition(" to ")
    target = process.pid if whom == "the sweep" else -process.pid
    os.kill(target, getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == code
    assert gone(child)
    assert (tmp_path / "out" / "seed=0" / "saved").exists()
    assert not (tmp_path / "out" / "seed=1").exists()


def test_a_run_that_fails_stops_no_other_and_the_report_is_strict(sweep, tmp_path):
    process = sweep("--sweep=fails=0,1", "--sweep=loss=inf,2,4", "--sweep=seed=0,1")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "6 of 12 runs failed" in errors
    text = (tmp_path / "out" / "sweep.json").read_text()
    report = json.loads(text, parse_constant=pytest.fail)
    assert len(report["runs"]) == 6
    assert {x["settings"]["fails"] for x in report["failed"]} == {"1"}
    rows = {row["name"]: row["scores"]["test/loss"] for row in report["rows"]}
    assert rows == {
        "fails=0,loss=inf": ["inf", "nan", 2],
        "fails=0,loss=2": [2.0, 0.0, 2],
        "fails=0,loss=4": [4.0, 0.0, 2],
    }
    assert "fails=0,loss=inf" in out


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        (["seed"], "expected KEY=VALUE,VALUE"),
        (["seed=0,1,0"], "stands there twice"),
        (["seed=0,1", "seed=2,3"], "named twice"),
    ],
)
def test_what_cannot_be_swept_is_said_before_the_first_run(swept, message):
    with pytest.raises(UserError, match=message):
        combinations(swept)


NASTY = [
    *("", "none", "/", "a/run", "b/run", "a/run/", "run", "a/b/run", ".", "..", "../a"),
    *(" ", "a b", "a_b", "a  b", "a=b", "(1,2)", "(1, 2)", "[1,2]", "1,2", "1e-3"),
    *("0.001", "A", "a", "RUN", "~", "~/a", "\u00e9", "e\u0301", "\u65e5\u672c", "\n"),
    *("x" * 300, "x" * 301, "y" * 20 + "/" + "x" * 300, "\udc80", "a\\b", "a:b", "*"),
]


def test_names_of_runs_are_other_ones_for_other_settings_and_fit_into_a_folder(
    tmp_path,
):
    settings = [
        {"init_from": a, "data.tokenizer.path": b} for a in NASTY for b in NASTY
    ]
    settings += [{"optim.b2": a} for a in NASTY] + [{"decay.b2": a} for a in NASTY]
    settings += [{"a": x, "seed": "0"} for x in NASTY]
    settings += [dict.fromkeys(map(str, range(n)), "x" * 40) for n in range(2, 9)]
    names = [name_of(x) for x in settings]
    assert len({x.casefold() for x in names}) == len(settings)
    for name in names:
        assert "/" not in name and len(os.fsencode(name)) <= 255
    for name in names[-9:]:
        (tmp_path / name).mkdir()
    assert name_of({"seed": "0", "optim.b2": "0.95"}) == "seed=0,optim.b2=0.95"
