"""A fork goes on exactly as the run it was taken from, and changes nothing there."""

import json
import os

import kill_harness
import pytest

from triform import forks, train
from triform.configs import schema
from triform.configs.variants import adapters
from triform.runtime.errors import UserError


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Seven steps with dropout, accumulation and a moving average, saved after each."""
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    kill_harness.write_corpus(tmp_path / "corpus.jsonl")
    trunk = schema.TransformerConfig(num_layers=1, d_model=16, num_heads=2, d_ff=32)
    trunk.max_len, trunk.dropout = 16, 0.1
    return schema.ExperimentConfig(
        model=schema.LanguageModelConfig(trunk, vocab_size=259),
        data=schema.CausalLMConfig(
            source=str(tmp_path / "corpus.jsonl"),
            max_len=16,
            batch_size=8,
            tokenizer=schema.TokenizerConfig(kind="bytes"),
        ),
        optim=schema.OptimConfig("adamw", warmup_steps=2, accumulate=2, ema_decay=0.9),
        evaluation=schema.EvaluationConfig(every=3, examples=8, metrics=()),
        checkpoint=schema.CheckpointConfig(every=2, keep_newest=9),
        log_every=2,
        steps=7,
    )


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
