"""Checkpoints: what was saved comes back, or an error says what to do."""

import dataclasses
import gc
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from triform.runtime.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
)

# Orbax leaves coroutines behind when it cannot read an array.
_COROUTINES = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = pytest.mark.filterwarnings(_COROUTINES)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array


def sharded(devices: int, *spec) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_state(seed: int = 0, width: int = 128, devices: int = 8) -> State:
    """A state of every kind of leaf, sharded over `devices`."""
    table = jax.random.normal(jax.random.key(seed), (64, width))
    params = {
        "table": table,
        "half": table.astype(jnp.bfloat16),
        "eight": table.astype(jnp.float8_e4m3fn),
        "mask": table > 0,
        "small": (table * 10).astype(jnp.int8),
        "scalar": jnp.float32(seed),
        "empty": jnp.zeros((0, 3)),
    }
    opt_state = optax.adam(1e-3).init({"table": table})
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(seed, x.dtype), opt_state)
    state = State(jnp.int32(seed), params, opt_state, jax.random.key(seed + 7))
    return jax.tree.map(lambda x: jax.device_put(x, layout(x, devices)), state)


def layout(x, devices: int) -> NamedSharding:
    return sharded(devices, "x") if x.ndim and x.size else sharded(devices)


def abstract(state, devices: int = 8):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout(x, devices)),
        state,
    )


def assert_equal(left, right) -> None:
    def bits(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))


def save_steps(directory, steps, config=None, losses=None) -> None:
    config = config or CheckpointConfig(every=1)
    with Checkpointer(str(directory), config) as checkpointer:
        for step in steps:
            metrics = None
            if losses and losses.get(step) is not None:
                metrics = {"eval/loss": losses[step]}
            checkpointer.save(step, make_state(step), meta={"s": step})
            if metrics:
                checkpointer.record(step, metrics)


def data_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold array bytes, largest first."""
    files = [p for p in directory.glob("state/**/d/*") if p.is_file()]
    return sorted(files, key=lambda p: -p.stat().st_size)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> pathlib.Path:
    """A directory with the steps 1, 2, 3; copy it before damaging it."""
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    save_steps(directory, [1, 2, 3])
    return directory


@pytest.fixture
def copy(three, tmp_path):
    yield shutil.copytree(three, tmp_path / "checkpoints")
    gc.collect()  # collects those coroutines here, where their warning is ignored


def restore(directory, devices=8, step=None):
    with Checkpointer(str(directory), CheckpointConfig()) as checkpointer:
        return checkpointer.restore(abstract(make_state(), devices), step)


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", 0), ("keep_newest", 0), ("keep_best", -1), ("mode", "lowest")],
)
def test_config_errors_name_the_value(field, value):
    config = dataclasses.replace(CheckpointConfig(), **{field: value})
    with pytest.raises(ValueError, match=f"checkpoint.{field}={value!r}"):
        config.validate()


def test_relative_new_directory_and_meta(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta = {"config": {"lr": 0.1, "sizes": (1, 2)}, "data": {2: "a", 10: "b"}}
    with Checkpointer("run/checkpoints", CheckpointConfig()) as checkpointer:
        assert checkpointer.restore(abstract(make_state())) is None
        assert str(checkpointer.directory) == str(tmp_path / "run" / "checkpoints")
        assert (checkpointer.steps(), checkpointer.latest()) == ([], None)
        assert checkpointer.best() is None and not os.path.exists("run")
        checkpointer.save(5, make_state(5), meta=meta)
        checkpointer.record(5, {"eval/loss": 2})
    with Checkpointer("run/checkpoints", CheckpointConfig()) as checkpointer:
        state, restored = checkpointer.restore(abstract(make_state()))
        assert checkpointer.metrics_of(5) == {"eval/loss": 2.0}
    assert restored["config"] == {"lr": 0.1, "sizes": [1, 2]}
    assert restored["data"] == {"2": "a", "10": "b"}
    assert_equal(state, make_state(5))
    assert state.rng.dtype == make_state().rng.dtype  # a typed key again


def test_async_save_survives_donation(tmp_path):
    update = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    x = jnp.arange(2.0**20).reshape(1024, 1024)
    state = {"w": jax.device_put(x, sharded(8, "x")), "one": jnp.arange(1e6)}
    expected = jax.tree.map(np.array, state)
    want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpointer(str(tmp_path / "c"), CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, meta={})
        # XLA copies where orbax still reads the buffer, and reuses it where not.
        jax.block_until_ready(update(state))
        restored, _ = checkpointer.restore(want)
    assert_equal(restored, expected)


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_other_number_of_devices(three, devices):
    state, meta = restore(three, devices)
    assert meta == {"s": 3}
    assert_equal(state, make_state(3))
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_equivalent_to(layout(leaf, devices), leaf.ndim)


def test_mixed_device_sets(tmp_path):
    state = {
        "one": jax.device_put(jnp.arange(4.0), jax.devices()[3]),
        "all": jax.device_put(jnp.arange(8.0), sharded(8, "x")),
        "free": jnp.int32(3),
    }
    with Checkpointer(str(tmp_path / "c"), CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, meta={}, wait=True)
        want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        restored, _ = checkpointer.restore(want)
    assert_equal(restored, state)


def test_params_only(copy):
    params = abstract(make_state(), 4).params
    with Checkpointer(str(copy), CheckpointConfig()) as checkpointer:
        assert_equal(checkpointer.restore_params(params, 2), make_state(2).params)
        assert_equal(checkpointer.restore_params(params), make_state(3).params)
        state, _ = checkpointer.restore(abstract(make_state()))  # same manager
        assert_equal(state, make_state(3))
        flip_table_byte(copy / "3", 3)
        with pytest.raises(CheckpointError, match="step 3.*corrupt.*params/table"):
            checkpointer.restore_params(params)
        assert checkpointer.steps() == [1, 2, 3]  # a reader moves nothing


def test_leftovers_are_removed_by_the_next_save_and_not_by_a_reader(copy):
    (copy / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert restore(copy)[1] == {"s": 3}
    assert (copy / "9.orbax-checkpoint-tmp").exists()  # perhaps a run is saving it
    save_steps(copy, [4])
    assert sorted(os.listdir(copy)) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": np.ones(2)}}, "a/b is a ndarray"),
        ({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, "two leaves have the path a/b"),
    ],
)
def test_unsupported_leaves(tmp_path, state, message):
    with Checkpointer(str(tmp_path / "c"), CheckpointConfig()) as checkpointer:
        with pytest.raises(CheckpointError, match=message):
            checkpointer.save(1, state, meta={})


# Retention.


def test_newest_and_best_are_kept(tmp_path):
    config = CheckpointConfig(every=1, keep_newest=2, keep_best=1)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 5.0, 6: None}
    save_steps(tmp_path / "c", [1, 2, 3], config, losses)
    save_steps(tmp_path / "c", [4, 5, 6], config, losses)  # metrics read from disk
    with Checkpointer(str(tmp_path / "c"), config) as checkpointer:
        assert checkpointer.steps() == [2, 5, 6]
        assert (checkpointer.latest(), checkpointer.best()) == (6, 2)
        assert checkpointer.metrics_of(6) == {}
    assert sorted(os.listdir(tmp_path / "c")) == ["2", "5", "6"]
    highest = dataclasses.replace(config, mode="max")
    with Checkpointer(str(tmp_path / "c"), highest) as checkpointer:
        assert checkpointer.best() == 5


def test_newest_is_kept_when_it_is_the_worst(tmp_path):
    config = CheckpointConfig(every=1, keep_newest=1, keep_best=2)
    save_steps(tmp_path / "c", [1, 2, 3, 4], config, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    assert sorted(os.listdir(tmp_path / "c")) == ["1", "2", "4"]


def test_a_step_off_the_schedule_goes_with_the_next_save(tmp_path):
    config = CheckpointConfig(every=2, keep_newest=2, keep_best=0)
    save_steps(tmp_path / "c", [2, 4, 5], config)
    with Checkpointer(str(tmp_path / "c"), config) as checkpointer:
        assert checkpointer.steps() == [2, 4, 5]
    save_steps(tmp_path / "c", [6], config)
    with Checkpointer(str(tmp_path / "c"), config) as checkpointer:
        assert checkpointer.steps() == checkpointer.on_schedule() == [4, 6]


def test_save_that_orbax_would_drop_raises(copy):
    with Checkpointer(str(copy), CheckpointConfig()) as checkpointer:
        for step in (3, 2):
            with pytest.raises(CheckpointError, match=f"step {step} .*holds step 3"):
                checkpointer.save(step, make_state(step), meta={})


# Corruption.


def flip_table_byte(directory: pathlib.Path, seed: int) -> None:
    """Flip one bit of params/table on disk, found by its known bytes."""
    row = np.asarray(make_state(seed).params["table"])[5].tobytes()
    for path in data_files(directory):
        content = bytearray(path.read_bytes())
        at = content.find(row)
        if at >= 0:
            content[at + 3] ^= 1
            path.write_bytes(content)
            return
    raise AssertionError("the array is not stored as it is: compressed?")


def truncate(directory: pathlib.Path, seed: int) -> None:
    for path in data_files(directory):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_digit_of_meta(directory: pathlib.Path, seed: int) -> None:
    path = directory / "meta" / "metadata"
    text = path.read_text()
    assert f'"s": {seed}' in text
    path.write_text(text.replace(f'"s": {seed}', f'"s": {seed + 4}'))


DAMAGE = {
    "flipped bit": flip_table_byte,
    "truncated": truncate,
    "data removed": lambda d, seed: [p.unlink() for p in data_files(d)],
    "state removed": lambda d, seed: shutil.rmtree(d / "state"),
    "meta removed": lambda d, seed: shutil.rmtree(d / "meta"),
    "meta torn": lambda d, seed: (d / "meta" / "metadata").write_text('{"crc32": 1'),
    "meta changed": flip_digit_of_meta,
    "all empty": lambda d, seed: [
        os.truncate(p, 0) for p in d.rglob("*") if p.is_file()
    ],
    "all removed": lambda d, seed: (shutil.rmtree(d), d.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_falls_back_and_can_be_saved_again(copy, damage, caplog):
    DAMAGE[damage](copy / "3", 3)
    with Checkpointer(str(copy), CheckpointConfig()) as checkpointer:
        with caplog.at_level(logging.WARNING):
            state, meta = checkpointer.restore(abstract(make_state()))
        assert meta == {"s": 2}
        assert_equal(state, make_state(2))
        warning = [r.getMessage() for r in caplog.records if "moved" in r.getMessage()]
        assert len(warning) == 1 and "checkpoint 3" in warning[0]
        if damage == "flipped bit":
            assert "mismatch in params/table;" in warning[0]
        assert (copy.parent / "corrupt" / "3").is_dir()
        assert checkpointer.steps() == [1, 2]
        checkpointer.save(3, make_state(30), meta={"again": True})
        state, meta = checkpointer.restore(abstract(make_state()))
        assert meta == {"again": True}
        assert_equal(state, make_state(30))


def test_each_single_file_removed_is_survived(copy):
    """Whatever file is lost: the step is restored right, or the one before it is."""
    files = [p.relative_to(copy / "3") for p in (copy / "3").rglob("*") if p.is_file()]
    for file in files:
        trial = shutil.copytree(copy, copy.parent / "trial" / "checkpoints")
        (trial / "3" / file).unlink()
        state, meta = restore(trial)
        assert_equal(state, make_state(meta["s"]))
        shutil.rmtree(trial.parent)


def test_two_corrupt_then_all_corrupt(copy, tmp_path):
    for step in (2, 3):
        flip_table_byte(copy / str(step), step)
    state, meta = restore(copy)
    assert meta == {"s": 1}
    assert sorted(os.listdir(tmp_path / "corrupt")) == ["2", "3"]
    flip_table_byte(copy / "1", 1)
    with pytest.raises(CheckpointError, match="no intact.*step 1: .*params/table"):
        restore(copy)
    assert sorted(os.listdir(tmp_path / "corrupt")) == ["1", "2", "3"]


def test_explicit_step(copy):
    assert restore(copy, step=1)[1] == {"s": 1}
    with pytest.raises(CheckpointError, match=r"step 7 .*\[1, 2, 3\]"):
        restore(copy, step=7)
    flip_table_byte(copy / "2", 2)
    with pytest.raises(CheckpointError, match="step 2 .*corrupt .*params/table"):
        restore(copy, step=2)
    assert (copy / "2").is_dir()  # only the search for the newest moves


def test_other_model_is_not_corruption(copy):
    wider = abstract(make_state(width=24))
    more = abstract(make_state())
    more.params["extra"] = more.params["table"]
    with Checkpointer(str(copy), CheckpointConfig()) as checkpointer:
        shapes = r"params/\w+ \(saved \w+\[64, 128\], wanted \w+\[64, 24\]"
        with pytest.raises(CheckpointError, match=shapes):
            checkpointer.restore(wider)
        with pytest.raises(CheckpointError, match="extra .saved nothing, wanted float"):
            checkpointer.restore(more)
        del more.params["extra"], more.params["half"]
        with pytest.raises(CheckpointError, match="half .saved bfloat.*wanted nothing"):
            checkpointer.restore_params(more.params)
        assert checkpointer.steps() == [1, 2, 3]
    assert not (copy.parent / "corrupt").exists()


# Failing and killed saves.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the program mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("early", [True, False])
def test_full_disk(small_disk, early, monkeypatch):
    if not early:  # the disk fills up after the check
        monkeypatch.setattr(Checkpointer, "_free", lambda self: 1e12)
    state = {"w": jax.random.normal(jax.random.key(0), (3 * 2**18,))}  # 3 MB
    want = {"w": jax.ShapeDtypeStruct((3 * 2**18,), jnp.float32)}
    config = CheckpointConfig(every=1, keep_newest=1, keep_best=0)
    message = r"step 2 could not be saved.*newest intact step is 1;.*free disk space"
    directory = str(small_disk / "c")
    with Checkpointer(directory, config) as checkpointer:
        checkpointer.save(1, state, meta={}, wait=True)
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"x" * 4 * 2**20)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpointer.save(2, state, meta={})
            checkpointer.wait()
        assert "\n" not in str(caught.value)
        checkpointer.wait()  # the error is told once
        assert checkpointer.steps() == [1]
        assert_equal(checkpointer.restore(want)[0], state)
        ballast.unlink()
        checkpointer.save(2, state, meta={}, wait=True)  # same number, same manager
        assert checkpointer.steps() == [2]
        assert os.listdir(directory) == ["2"]


def test_background_failure_surfaces(small_disk, caplog, monkeypatch):
    monkeypatch.setattr(Checkpointer, "_free", lambda self: 1e12)
    state = {"w": jax.random.normal(jax.random.key(0), (2**21,))}  # 8 MB
    directory = str(small_disk / "c")
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        with Checkpointer(directory, CheckpointConfig()) as checkpointer:
            checkpointer.save(1, state, meta={})
    with pytest.raises(CheckpointError, match="step 2 .*newest intact step is None"):
        with Checkpointer(directory, CheckpointConfig()) as checkpointer:
            checkpointer.save(2, state, meta={})
            checkpointer.save(3, state, meta={})
    with pytest.raises(KeyError, match="bug in the loop"):
        with Checkpointer(directory, CheckpointConfig()) as checkpointer:
            checkpointer.save(4, state, meta={})
            raise KeyError("bug in the loop")
    assert "step 4 could not be saved" in caplog.text


CHILD = """
import sys
import jax, jax.numpy as jnp
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
directory, first = sys.argv[1], int(sys.argv[2])
config = CheckpointConfig(every=1, keep_newest=2, keep_best=0)
with Checkpointer(directory, config) as checkpointer:
    for step in range(first, first + 10000):
        state = {'w': jnp.full((2**20,), step, jnp.float32)}
        checkpointer.save(step, state, meta={'step': step})
        if step % 2:
            checkpointer.wait()
            print(step, flush=True)
"""


def test_sigkill(tmp_path):
    """After a kill at any moment the newest step reported saved is there, and right."""
    directory = str(tmp_path / "c")
    want = {"w": jax.ShapeDtypeStruct((2**20,), jnp.float32)}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    first, rng = 1, random.Random(0)
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, directory, str(first)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        lines = [child.stdout.readline()]  # wait for the first step
        time.sleep(rng.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        lines += child.communicate()[0].splitlines()
        reported = max(int(line) for line in lines if line.strip())
        with Checkpointer(directory, CheckpointConfig()) as checkpointer:
            state, meta = checkpointer.restore(want)
        assert meta["step"] >= reported
        assert (np.asarray(state["w"]) == meta["step"]).all()
        first = meta["step"] + 1
    assert not (tmp_path / "corrupt").exists()
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        checkpointer.save(first, state, meta={})
    assert not [name for name in os.listdir(directory) if "tmp" in name]
