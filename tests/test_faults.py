"""Faults of disks, clocks, threads and users: one line each, and a run that resumes."""

import builtins
import errno
import io
import os
import re
import shutil
import threading
import time

import kill_harness
import pytest
import tiny_run

from triform import input_pipeline, train
from triform import workdir as workdirs
from triform.runtime import launch, locks
from triform.runtime.errors import UserError

STEPS = 6
# Orbax leaves coroutines behind when it cannot read an array.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with `whole`, a run of 6 steps, and `half`, the same interrupted."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIFORM_CACHE", str(folder / "cache"))
        config, asked = tiny_run.config(folder, steps=STEPS, every=1), []

        def stop():
            asked.append(1)
            return "enough" if len(asked) > 8 else ""

        train.run(config, str(folder / "whole"))
        train.run(config, str(folder / "half"), stop=stop)
        saved = {int(x) for x in os.listdir(folder / "half" / "checkpoints")}
        assert {2, 3} < saved and max(saved) < STEPS, saved
        yield folder


@pytest.fixture
def half(base, tmp_path):
    """A copy of the interrupted run; and its config."""
    shutil.copytree(base / "half", tmp_path / "half")
    return tmp_path / "half", tiny_run.config(base, steps=STEPS, every=1)


def goes_on(base, workdir, config):
    """It ends as the run that met no fault."""
    train.run(config, str(workdir))
    one, other = (kill_harness.contents(x) for x in (base / "whole", workdir))
    assert {k for k in one if one[k] != other[k]} == set()


def told(run) -> str:
    """The line that a user is told of the error that ends a run; "" if none does."""
    failure = None
    try:
        run()
    except Exception as error:
        failure = error
    text = launch.one_line(failure) if failure else ""
    assert bool(text) == bool(failure), repr(failure)
    assert "\n" not in text
    return text


def newest(workdir):
    """The files with data of the newest checkpoint.

    Some hold only what was written again later, where the disk was slow: which ones is
    not ours to know.
    """
    steps = [int(x) for x in os.listdir(workdir / "checkpoints") if x.isdigit()]
    folder = workdir / "checkpoints" / str(max(steps)) / "state"
    return list(folder.glob("**/d/*"))


# A full or read-only disk, wherever something is written.


class Disk:
    """`open`, with a note of what is written below a folder, and one fault."""

    def __init__(self, folder, patch):
        self.folder, self.seen = str(folder), {}
        self.fails, self.error = "", errno.ENOSPC
        self._open = builtins.open
        patch.setattr(builtins, "open", self.open)
        patch.setattr(io, "open", self.open)

    def kind(self, path):
        """The path without numbers and names that chance has chosen."""
        name = os.path.relpath(path, self.folder).split(os.sep, 1)[-1]
        name = re.sub(r"triform-parts?-\w+", "PART", name)
        name = re.sub(r"[0-9a-f]{8,}", "H", name)
        return re.sub(r"\d+", "N", name)

    def open(self, file, mode="r", *args, **options):
        path = file if isinstance(file, str) else getattr(file, "__fspath__", str)()
        if set(mode) & set("wax+") and path.startswith(self.folder):
            kind = self.kind(path)
            self.seen.setdefault(kind, path)
            if kind == self.fails and self.error == errno.ENOSPC:
                # It is made, and is full as soon as something reaches the disk.
                self._open(file, mode, *args, **options).close()
                file, mode = "/dev/full", re.sub("[xa]", "w", mode).replace("+", "")
            elif kind == self.fails:
                raise OSError(self.error, os.strerror(self.error), path)
        return self._open(file, mode, *args, **options)


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS"])
def test_whatever_cannot_be_written_is_one_line_and_the_run_resumes(
    error, base, tmp_path, monkeypatch
):
    """First all that a run writes is found out; then each of it fails in its turn."""
    config = tiny_run.config(base, steps=STEPS, every=1)
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    config.data.tokenizer.kind = "chars"  # a tokenizer with a file
    config.model.vocab_size = 40
    disk = Disk(tmp_path, monkeypatch)
    disk.error = getattr(errno, error)
    train.run(config, str(tmp_path / "whole"))
    kinds, number, lines = list(disk.seen), 0, {}
    assert len(kinds) >= 8, kinds
    for kind in kinds:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        disk.fails, workdir = kind, tmp_path / f"run{number}"
        if line := told(lambda at=workdir: train.run(config, str(at))):
            lines[kind] = line
            assert os.strerror(disk.error) in line, (kind, line)
        else:
            number += 1  # it was finished without; the next in a new workdir
    disk.fails = ""
    for at in range(number + 1):
        train.run(config, str(tmp_path / f"run{at}"))
        one = kill_harness.contents(tmp_path / "whole")
        assert one == kill_harness.contents(tmp_path / f"run{at}")
    assert len(lines) >= 8, lines


# Files of checkpoints.


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 4, len(content), len(content) // 4):
        content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {"truncated": truncated, "flipped": flipped, "missing": os.unlink}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_moved_and_the_one_before_is_used(damage, base, half):
    workdir, config = half
    for path in newest(workdir):
        DAMAGE[damage](path)
    goes_on(base, workdir, config)
    assert len(os.listdir(workdir / "corrupt")) == 1


@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
def test_a_read_error_moves_nothing(error, base, half, monkeypatch):
    workdir, config = half
    before = sorted(os.listdir(workdir / "checkpoints"))
    number = getattr(errno, error)

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "a file")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fail)
        text = told(lambda: train.run(config, str(workdir)))
    assert os.strerror(number) in text and "nothing was moved" in text
    assert sorted(os.listdir(workdir / "checkpoints")) == before
    goes_on(base, workdir, config)


def test_metrics_without_a_checkpoint_never_begin_anew_silently(base, half, capsys):
    workdir, config = half
    before = (workdir / "metrics.jsonl").read_text()
    kept = workdir.parent / "elsewhere"
    (workdir / "checkpoints").rename(kept)
    scores = (workdir / "scores.json").rename(workdir.parent / "scores.json")
    text = told(lambda: train.run(config, str(workdir)))
    assert "no checkpoint is in" in text and "--resume=0" in text
    assert (workdir / "metrics.jsonl").read_text() == before
    kept.rename(workdir / "checkpoints")
    scores.rename(workdir / "scores.json")
    goes_on(base, workdir, config)
    # Beginning anew is possible, and loses nothing.
    train.run(config, str(workdir), resume=0)
    one, other = (kill_harness.contents(x) for x in (base / "whole", workdir))
    assert one["metrics.jsonl"] == other["metrics.jsonl"]
    assert {"1", "6", "metrics.jsonl"} <= set(os.listdir(workdir / "set_aside"))
    assert train.run(config, str(workdir), resume=0)
    assert "resume=0: done before" in capsys.readouterr().out


def test_what_ended_before_its_first_save_says_so_and_begins_anew(base, half, capsys):
    workdir, config = half
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "scores.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text(lines[0])
    goes_on(base, workdir, config)
    assert "ended before its first save: steps 1 to 2" in capsys.readouterr().out


# What is no file.


def test_a_clock_that_jumps_back_changes_nothing(base, half, monkeypatch):
    workdir, config = half
    real, calls = time.time, []

    def jumping():
        calls.append(1)
        return real() - 1e5 * (len(calls) // 10)

    monkeypatch.setattr(time, "time", jumping)
    goes_on(base, workdir, config)
    assert len(calls) > 20


def test_a_thread_that_dies_is_one_line(base, half, monkeypatch):
    workdir, config = half

    class Killed(BaseException):
        pass

    def die(self, entry):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(input_pipeline.Prefetch, "_offer", die)
        patch.setattr(threading, "excepthook", lambda args: None)
        text = told(lambda: train.run(config, str(workdir)))
    assert "thread that prepares batches has died" in text
    goes_on(base, workdir, config)


def test_a_second_start_is_refused(base, half):
    workdir, config = half
    with locks.lock(str(workdir)):
        text = told(lambda: train.run(config, str(workdir)))
    assert "another train.py runs in it" in text
    goes_on(base, workdir, config)


def test_a_moved_workdir_goes_on_though_what_it_began_with_is_gone(
    base, tmp_path, monkeypatch
):
    """Its parameters came from another run, and some of them are frozen."""
    config = tiny_run.config(base, steps=2, every=1)
    config.init_from = str(tmp_path / "first")
    shutil.copytree(base / "half", tmp_path / "first")
    config.optim.train = (".*feed_forward.*",)
    train.run(config, str(tmp_path / "here"))
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "here").rename(tmp_path / "there")
    config.steps = 3
    assert train.run(config, str(tmp_path / "there"))["test/loss"] > 0
    assert not (tmp_path / "here").exists()
    assert workdirs.load(str(tmp_path / "there")).params


def test_a_workdir_that_is_a_file_is_refused(base, half, tmp_path):
    (tmp_path / "file").write_text("")
    text = told(lambda: train.run(half[1], str(tmp_path / "file")))
    assert "file" in text


def test_a_missing_step_is_named(half):
    workdir, config = half
    with pytest.raises(UserError, match="resume=77"):
        train.run(config, str(workdir), resume=77)
