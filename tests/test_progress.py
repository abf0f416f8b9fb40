"""What programs say while they work: nobody waits in silence."""

import io
import re
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from triform.runtime import progress
from triform.runtime.metrics import Mean
from triform.runtime.progress import Progress, stage


@pytest.fixture
def hurried(monkeypatch):
    """Waiting times of a tenth of a second in place of seconds."""
    monkeypatch.setattr(progress, "SOON", 0.05)
    monkeypatch.setattr(progress, "QUIET", 0.1)


def test_a_quick_stage_is_one_line_that_says_how_long_it_took():
    out = io.StringIO()
    with stage("compiling", file=out):
        pass
    assert out.getvalue() == "compiling: 0.0 s\n"


def test_a_slow_stage_says_that_it_began_and_goes_on_saying_how_far_it_is(hurried):
    out = io.StringIO()
    with stage("scoring", file=out) as note:
        time.sleep(0.15)
        note("3 of 9 examples")
        time.sleep(0.3)
    first, *between, last = out.getvalue().splitlines()
    assert re.fullmatch(r"scoring \.\.\. \d+ s", first)
    assert between
    assert between[-1].endswith(" s, 3 of 9 examples")
    assert float(re.fullmatch(r"scoring: (.*) s", last)[1]) >= 0.4


def test_what_is_over_in_time_need_not_be_told():
    out = io.StringIO()
    with stage("saving", least=1.0, file=out):
        pass
    assert out.getvalue() == ""


def test_a_stage_that_fails_does_not_say_that_it_is_done():
    out = io.StringIO()
    with pytest.raises(OSError, match="disk"), stage("saving", file=out):
        raise OSError("disk")
    assert out.getvalue() == ""


def test_a_reader_who_is_gone_does_not_end_the_work(hurried):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError), stage("scoring", file=Gone()):
        time.sleep(0.2)  # the thread met it, and it is the main thread that tells


@pytest.fixture
def run(monkeypatch, capsys):
    """(steps between reports) -> progress of a run whose output is a file."""
    opened = []

    def make(every, **fields):
        opened.append(Progress(0, 100, every, lambda t: 0.1, {}, **fields))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def measured():
    return {
        "loss": Mean(jnp.float32(2), jnp.float32(1)),
        "grad_norm": Mean(jnp.float32(1), jnp.float32(1)),
    }


def test_a_step_that_lasts_is_told(run, hurried, capsys):
    slow = run(every=50)
    slow.update(1, measured(), 10)
    time.sleep(0.3)
    assert re.search(r"step 2/100 \.\.\. \d+ s", capsys.readouterr().out)


def test_many_steps_are_told_before_their_report(run, capsys):
    many = run(every=50)
    many.update(1, measured(), 10)
    assert capsys.readouterr().out == ""  # nothing is due yet
    many.said -= progress.QUIET
    many.update(2, measured(), 10)
    assert "step 2/100  loss 2.0000" in capsys.readouterr().out


def test_quick_steps_are_told_once_a_report(run, capsys):
    quick = run(every=2)
    found = [quick.update(step, measured(), 10) for step in (1, 2, 3, 4)]
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [x is None for x in found] == [True, False, True, False]


def test_real_units_are_counted_over_restarts(run):
    assert run(every=2, seen=70).seen == 70
    going = run(every=2, seen=70)
    going.update(1, measured(), 8)
    going.update(2, measured(), 9)
    assert going.seen == 87


def test_other_work_between_steps_speaks_for_itself(run, hurried, capsys):
    idle = run(every=50)
    with idle.paused():
        capsys.readouterr()
        time.sleep(0.3)
        assert capsys.readouterr().out == ""


def test_flops_are_told_with_their_share_of_the_peak_on_one_line(run, capsys):
    fast = run(every=2)
    fast.total, fast.peak = 1_000_000, 8e15
    fast.since -= 10.0
    fast.started -= 1e6  # left: more than a day
    fast.update(999_997, measured(), 10**6, 4 * 10**15)
    line = fast.update(999_998, measured(), 10**6, 4 * 10**15)
    assert line["train/flops_per_second"] == pytest.approx(8e14, rel=0.01)
    assert line["train/mfu"] == pytest.approx(0.1, rel=0.01)
    said = capsys.readouterr().out.rstrip("\n")
    assert re.search(r"tokens/s  \d+ TFLOP/s 10%  data", said)
    assert len(said) < 110
    assert said.startswith("step 999998/1000000  loss 2.0000  ")
    # Of one step they are not known: nothing is said.
    fast.update(999_999, measured(), 10, 0)
    assert "train/flops_per_second" not in fast.update(10**6, measured(), 10, 5)


def test_the_lock_of_lines_is_there_before_a_thread_writes():
    """tqdm imports for it, which another thread's lazy imports may intercept."""
    code = "from triform.runtime import progress; assert progress.tqdm._lock"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_nothing_counted_for_is_not_reported(run):
    nothing = {"text_loss": Mean(jnp.float32(0), jnp.float32(0))}
    line = run(every=1).update(1, measured() | nothing, 10)
    assert line["train/loss"] == 2 and "train/text_loss" not in line
