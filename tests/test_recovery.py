"""What a run does when checkpoints cannot be read, or numbers are no longer finite."""

import errno
import json
import math
import os
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from triform import recovery, train
from triform.configs import gpt_shakespeare_char
from triform.data import store
from triform.runtime import guard, metrics, read_errors
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import CheckpointError, TriformError, UserError
from triform.runtime.events import Events

STATE = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)}
WANTED = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)


@pytest.fixture
def folder(tmp_path):
    """A workdir with checkpoints of the steps 1, 2 and 3."""
    with opened(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, STATE, meta={"config": "one", "resume": None})
            checkpointer.record(step, {"eval/loss": 1.0})
    return tmp_path


def opened(workdir):
    return Checkpointer(str(workdir / "checkpoints"), CheckpointConfig(every=1))


# Failed reads.

ERRNOS = ("EIO", "ESTALE", "EMFILE", "ENFILE", "EACCES", "EPERM", "ETIMEDOUT", "ENOMEM")


def by_python(number):
    return OSError(number, os.strerror(number), "file")


def by_a_library(number):
    error = ValueError("cannot restore")
    error.__cause__ = by_python(number)
    return error


def by_tensorstore(number):
    text = f"Failed to read from file: {os.strerror(number)} [os_error_code='{number}']"
    return ValueError(f"DATA_LOSS: Error opening zarr driver: {text}")


@pytest.mark.parametrize("say", [by_python, by_a_library, by_tensorstore])
@pytest.mark.parametrize("part", ["meta", "state"])
def test_a_failed_read_moves_nothing(say, part, folder, monkeypatch):
    for name in ERRNOS:

        def fail(*args, name=name, **kwargs):
            if part == "meta" and args[1].name != "meta":
                raise FileNotFoundError  # orbax looks for more than is saved
            raise say(getattr(errno, name))

        with opened(folder) as checkpointer, monkeypatch.context() as patch:
            if part == "meta":
                patch.setattr(ocp.JsonCheckpointHandler, "restore", fail)
            else:
                patch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
            with pytest.raises(CheckpointError, match="step 3 .*could not be read"):
                checkpointer.restore(WANTED)
    assert sorted(os.listdir(folder / "checkpoints")) == ["1", "2", "3"]
    assert sorted(os.listdir(folder)) == ["checkpoints", "scores.json"]
    with opened(folder) as checkpointer:
        assert checkpointer.restore(WANTED)[1]["config"] == "one"


def test_a_file_that_the_disk_does_not_give_is_not_a_file_that_is_damaged(folder):
    """Linux answers a read of the first bytes of this file with EIO."""
    for path in (folder / "checkpoints" / "3" / "state").rglob("d/*"):
        path.unlink()
        path.symlink_to("/proc/self/mem")
    with opened(folder) as checkpointer:
        with pytest.raises(CheckpointError, match="3 .*could not be .*Input/output"):
            checkpointer.restore(WANTED)
        assert checkpointer.steps() == [1, 2, 3]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), json.JSONDecodeError])
def test_what_is_missing_or_no_json_is_damage(error):
    if isinstance(error, type):
        error = error("no JSON", "", 0)
    assert isinstance(read_errors.classify(error, 3, "x"), read_errors.Corrupt)


@pytest.mark.parametrize("where", ["corrupt", "set_aside", "nowhere"])
def test_a_run_that_lost_all_checkpoints_does_not_begin_anew(where, folder):
    (folder / where).mkdir()
    for step in "123":
        (folder / "checkpoints" / step).rename(folder / where / step)
    for _ in range(2):
        with opened(folder) as checkpointer:
            with pytest.raises(CheckpointError, match="steps were saved once .*3"):
                checkpointer.restore(WANTED)
    (folder / where / "2").rename(folder / "checkpoints" / "2")
    with opened(folder) as checkpointer:
        assert checkpointer.restore(WANTED) is not None


def test_only_temporary_folders_of_steps_are_removed(folder):
    names = [f"{x}{ocp.utils.TMP_DIR_SUFFIX}1" for x in ("7", "mine", "")]
    for name in names:
        (folder / "checkpoints" / name).mkdir()
    with opened(folder) as checkpointer:
        checkpointer.save(4, STATE, meta={})
    left = set(os.listdir(folder / "checkpoints"))
    assert names[0] not in left
    assert left >= set(names[1:])


def test_only_what_killed_processes_left_in_a_cache_is_removed(tmp_path):
    old = time.time() - 30 * store.DAY
    ours = [f"{x}abc" for x in (store.STAGED, store.PARTS)]
    theirs = ["part-00000", "parts-1", "model.part", f"mine-{store.STAGED}"]
    for name in [*ours, *theirs, f"{store.STAGED}used", f"{store.PARTS}used"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
        if "used" not in name:
            os.utime(tmp_path / name / "file", (old, old))
        os.utime(tmp_path / name, (old, old))
    store._sweep(str(tmp_path))
    left = set(os.listdir(tmp_path))
    assert left == {*theirs, f"{store.STAGED}used", f"{store.PARTS}used"}


# Numbers that are not finite.

# Orbax leaves coroutines behind when it cannot read an array.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
BAD = [jnp.nan, jnp.inf, -jnp.inf]


@pytest.mark.parametrize("value", BAD)
def test_a_state_is_saved_only_if_it_is_finite(value, folder):
    with opened(folder) as checkpointer:
        health = recovery.Health(checkpointer, start=0)
        health.check_state(STATE | {"key": jax.random.key(0)}, 4)
        ruined = STATE | {"b": STATE["b"].at[1].set(value)}
        with pytest.raises(UserError, match="update made b .*newest checkpoint is 3"):
            health.check_state(ruined, 4)
        assert checkpointer.steps() == [1, 2, 3]


def measured(loss, norm=1.0):
    return {"train/loss": float(loss), "train/grad_norm": float(norm)}


def bad_step(health, scalars, step=4):
    config = guard.RecoveryConfig()
    watch = guard.Watch(config, {})
    recover = recovery.Recovery(config, health, watch, lambda *args: "")
    recover.bad_step(step, scalars, math.inf, "5, 6 of train", None)


@pytest.mark.parametrize("value", BAD)
def test_a_checkpoint_that_the_next_step_proves_ruined_is_set_aside(value, folder):
    with opened(folder) as checkpointer:
        health = recovery.Health(checkpointer, start=1)
        with pytest.raises(UserError) as caught:
            bad_step(health, measured(1.0, value))
        assert checkpointer.steps() == [1, 2]
        assert checkpointer.metrics_of(3) == {}
        assert os.listdir(folder / "set_aside") == ["3"]
        for part in ("step 4", "5, 6 of train", "newest checkpoint is 2"):
            assert part in str(caught.value)
        # Its number is free.
        checkpointer.save(3, STATE, meta={})


@pytest.mark.parametrize(
    ("start", "step"),
    [
        (3, 4),  # an earlier process saved it: today's settings may be the cause
        (0, 9),  # there were good steps in between
    ],
)
def test_a_checkpoint_that_may_be_good_stays(start, step, folder):
    with opened(folder) as checkpointer:
        health = recovery.Health(checkpointer, start)
        with pytest.raises(UserError, match="--resume=2"):
            bad_step(health, measured(jnp.nan), step)
        assert checkpointer.steps() == [1, 2, 3]


def test_an_evaluation_that_is_not_finite_stops(folder):
    with opened(folder) as checkpointer:
        health = recovery.Health(checkpointer, start=0)
        health.check_evaluation({"eval/loss": 9.0, "eval/perplexity": jnp.inf}, 3)
        with pytest.raises(UserError, match="step 3: eval/loss is nan"):
            health.check_evaluation({"eval/loss": float("nan")}, 3)
        assert checkpointer.steps() == [1, 2]


# Runs.


def config_of(steps, **optim):
    config = gpt_shakespeare_char.get_config("smoke")
    data = {"source": "cldr", "text": "en", "batch_size": 32, "max_len": 16}
    for name, value in data.items():
        setattr(config.data, name, value)
    config.data.tokenizer.kind, config.model.vocab_size = "bytes", 259
    config.model.trunk.num_layers = config.log_every = config.checkpoint.every = 1
    config.steps, config.evaluation.every = steps, 1000
    fields = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    for name, value in (fields | optim).items():
        setattr(config.optim, name, value)
    return config


@pytest.fixture
def steps_of(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))

    def find():
        lines = metrics.read_lines(str(tmp_path / "run"))
        return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}

    return find


def test_a_run_goes_on_after_a_step_that_ruined_it_and_back_to_older_ones(
    tmp_path, steps_of
):
    workdir = str(tmp_path / "run")
    train.run(config_of(3, learning_rate=1e-3), workdir)
    good = steps_of()
    with pytest.raises(UserError, match="is now .*set_aside/4"):
        train.run(config_of(6, learning_rate=1e30), workdir)
    sane = config_of(6, learning_rate=1e-3)
    train.run(sane, workdir)
    straight = steps_of()
    assert [*straight] == [1, 2, 3, 4, 5, 6]
    assert {k: straight[k] for k in good} == good
    assert max(straight.values()) < 20
    # Back to step 2, with another rate: what was done after it is kept elsewhere.
    slower = config_of(5, learning_rate=1e-4)
    train.run(slower, workdir, resume=2)
    again = steps_of()
    assert [*again] == [1, 2, 3, 4, 5]
    assert again[3] == straight[3]
    assert again[4] != straight[4]
    assert {"3", "4.1", "5", "6", metrics.FILE} <= {
        *os.listdir(tmp_path / "run/set_aside")
    }
    # A scheduler starts the same command again: it does not begin from step 2 anew.
    scores = train.run(slower, workdir, resume=2)
    assert scores["test/loss"] > 0
    assert steps_of() == again
    with pytest.raises(TriformError, match="resume=77"):
        train.run(slower, workdir, resume=77)


def test_readers_that_orbax_leaves_behind_end_without_a_traceback(monkeypatch):
    """Those of a damaged checkpoint: of the damage itself there is a line."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    read_errors.hush.__wrapped__()
    orbax = SimpleNamespace(co_filename="/lib/orbax/checkpoint/serialization.py")
    behind = SimpleNamespace(cr_code=orbax)
    other = SimpleNamespace(object=None, exc_value=ValueError("ours"))
    closed = RuntimeError("Event loop is closed")
    sys.unraisablehook(SimpleNamespace(object=behind, exc_value=ValueError()))
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=closed))
    sys.unraisablehook(other)
    assert told == [other]


def test_events_on_a_full_disk_fail_once(tmp_path):
    """What is left in a buffer would be tried again, with a traceback, at exit."""
    events = Events(str(tmp_path), 0)
    full = open("/dev/full", "wb")  # noqa: SIM115  (closed by what is tested)
    events._writer._py_recordio_writer._writer = full
    events.add(1, "train/loss", 2.0)
    with pytest.raises(OSError, match="No space left"):
        events.close()
    assert full.closed
