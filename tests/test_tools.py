"""Tools read what runs keep, without a model, and change nothing."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from triform import tools
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import CheckpointError, UserError

STATE = {
    "params": {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)},
    "none": jnp.zeros((0, 2)),
    "rng": jax.random.key(3),
}


@pytest.fixture
def run(tmp_path):
    """(name, w) -> a workdir with the steps 1 and 2, whose w is `w` at step 2."""

    def make(name, w):
        changed = STATE | {"params": STATE["params"] | {"w": w}}
        where = str(tmp_path / name / "checkpoints")
        with Checkpointer(where, CheckpointConfig(every=1)) as checkpointer:
            checkpointer.save(1, STATE, meta={})
            checkpointer.save(2, changed, meta={})
        return tmp_path / name

    return make


def test_verify_names_the_damaged_step_and_moves_nothing(run, capsys):
    workdir = run("a", STATE["params"]["w"])
    assert tools.verify(str(workdir)) == 0
    assert capsys.readouterr().out.count("intact, 4 arrays") == 2
    folder = workdir / "checkpoints" / "2" / "state"
    largest = max(folder.rglob("d/*"), key=lambda x: x.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    before = sorted(workdir.rglob("*"))
    assert tools.verify(str(workdir)) == 1
    out = capsys.readouterr().out.splitlines()
    assert "step 1: intact" in out[0]
    assert "step 2" in out[1] and "corrupt" in out[1]
    assert sorted(workdir.rglob("*")) == before
    assert tools.verify(f"{workdir}:1") == 0


def test_inspect_shows_every_array(run, capsys):
    workdir = run("a", STATE["params"]["w"])
    assert tools.inspect(f"{workdir}:1") == 0
    out = capsys.readouterr().out
    for part in ("step 1", "params/w", "float32[3, 4]", "bfloat16[3]", "none", "48"):
        assert part in out
    assert f"{float(jnp.linalg.norm(STATE['params']['w'])):.6g}" in out


def test_diff_says_which_arrays_differ_and_by_how_much(run, capsys):
    w = STATE["params"]["w"]
    one, other = run("a", w), run("b", w.at[1, 2].add(0.5))
    assert tools.diff(str(one), f"{other}:1") == 0
    assert "0 of 4 arrays differ" in capsys.readouterr().out
    assert tools.diff(str(one), str(other)) == 1
    out = capsys.readouterr().out
    assert "params/w: 1 of 12 elements, largest difference 0.5" in out
    assert "1 of 4 arrays differ" in out


def test_a_step_that_is_not_there_is_not_called_damaged(run, capsys):
    workdir = run("a", STATE["params"]["w"])
    assert tools.verify(f"{workdir}:7") == 1
    for text in (capsys.readouterr().out, _told(tools.inspect, f"{workdir}:7")):
        assert "no checkpoint of step 7" in text and "[1, 2]" in text


def _told(call, *args):
    with pytest.raises(CheckpointError) as error:
        call(*args)
    return str(error.value)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        tools.verify(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no checkpoint is there"):
        tools.inspect(str(tmp_path))
    with pytest.raises(UserError, match="expected one of checkpoint verify"):
        tools.main(["tools", "checkpoint", "verify"])


def test_the_program_needs_no_device(run):
    workdir = run("a", STATE["params"]["w"])
    command = [sys.executable, "-m", "triform", "tools", "checkpoint", "verify"]
    done = subprocess.run(
        [*command, str(workdir)],
        env=os.environ | {"JAX_PLATFORMS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("intact") == 2
