"""Signals: one that asks a program to leave lets it save."""

import signal
import subprocess
import sys
import time

import pytest

from triform.runtime import signals

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
