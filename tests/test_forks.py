"""A fork goes on exactly as the run it was taken from, and changes nothing there."""

import json
import os

import kill_harness
import pytest
import tiny_run

from triform import forks, train
from triform.configs.variants import adapters
from triform.runtime.errors import UserError


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Seven steps, saved after every second."""
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    return tiny_run.config(tmp_path, steps=7, every=2)


def files_of(workdir):
    return {x: x.read_bytes() for x in sorted(workdir.rglob("*")) if x.is_file()}


def test_a_fork_with_nothing_changed_is_the_original(config, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    scores = train.run(config, str(first))
    before = files_of(first)
    again = train.run(config, str(second), fork=f"{first}:4")
    assert again == scores
    whole, forked = kill_harness.contents(first), kill_harness.contents(second)
    assert forked == whole
    assert files_of(first) == before
    # The same command again: nothing begins anew.
    assert train.run(config, str(second), fork=f"{first}:4") == scores
    with pytest.raises(UserError, match="holds another run; name a new one"):
        train.run(config, str(second), fork=f"{first}:2")


def test_what_may_not_change_is_refused_before_anything_is_written(config, tmp_path):
    adapters()(config)
    config.steps = 2
    first, second = tmp_path / "first", tmp_path / "second"
    train.run(config, str(first))
    config.optim.learning_rate *= 2
    config.model.model.trunk.d_ff = 48
    with pytest.raises(UserError, match="d_ff is 32 there, 48 here"):
        train.run(config, str(second), fork=f"{first}:2")
    config.model.model.trunk.d_ff = 32
    with pytest.raises(UserError, match="no checkpoint of that step; there are 2"):
        train.run(config, str(second), fork=f"{first}:3")
    with pytest.raises(UserError, match="RUN:STEP"):
        train.run(config, str(second), fork=str(first))
    assert not (second / "config.json").exists()
    # Another rate and more steps may be; what is frozen comes along.
    config.steps = 3
    train.run(config, str(second), fork=f"{first}:2")
    saved = json.loads((second / "config.json").read_text())
    assert saved["steps"] == 3
    assert os.listdir(second / "frozen") == ["0"]


def test_a_fork_that_was_killed_begins_again(config, tmp_path, monkeypatch):
    config.steps = 2
    first, second = tmp_path / "first", tmp_path / "second"
    train.run(config, str(first))

    def killed(*args):
        raise KeyboardInterrupt

    for name in ("_copy_steps", "_tested"):
        with monkeypatch.context() as patch:
            patch.setattr(forks, name, killed)
            with pytest.raises(KeyboardInterrupt):
                train.run(config, str(second), fork=f"{first}:2")
    scores = train.run(config, str(second), fork=f"{first}:2")
    assert scores == train.run(config, str(first))
