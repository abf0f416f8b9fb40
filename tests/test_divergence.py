"""A bad step stops a run, is skipped, or sends it back; and it can be seen again."""

import json
import math
import os
from collections import Counter

import jax
import jax.numpy as jnp
import kill_harness
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from triform import capsule, train
from triform.configs import schema
from triform.experiment import Experiment
from triform.runtime import guard, metrics, saved
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.first_nonfinite import first_nonfinite, looped
from triform.runtime.guard import RecoveryConfig

# A feed-forward layer that overflows early.
PLUGIN = """
import jax.numpy as jnp
def brittle(x):
    return x * jnp.where(abs(x).max() > 1e3, jnp.inf, 1.0)
FFNS = {"brittle": (brittle, False)}
"""
STEPS = 8


@pytest.fixture
def config(tmp_path, monkeypatch, no_plugins):
    """Eight steps, saved after every second; a few texts have the byte `#`."""
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    texts = [f"{i} of many texts" for i in range(32)]
    texts[10] = texts[20] = "#" * 16
    lines = [json.dumps({"text": x}) + "\n" for x in texts]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    trunk = schema.TransformerConfig(num_layers=2, d_model=16, num_heads=2, d_ff=32)
    trunk.max_len, trunk.dropout, trunk.norm_position = 16, 0.1, "pre"
    return schema.ExperimentConfig(
        model=schema.LanguageModelConfig(trunk, vocab_size=259),
        data=schema.CausalLMConfig(
            source=str(tmp_path / "corpus.jsonl"),
            held_out=0.0,
            train_split="all",
            eval_split="all",
            test_split="all",
            max_len=16,
            batch_size=4,
            tokenizer=schema.TokenizerConfig(kind="bytes"),
        ),
        optim=schema.OptimConfig("adamw", warmup_steps=2, accumulate=2),
        evaluation=schema.EvaluationConfig(every=100, examples=8, metrics=()),
        checkpoint=schema.CheckpointConfig(every=2, keep_newest=9),
        log_every=1,
        steps=STEPS,
    )


@pytest.fixture
def brittle(monkeypatch):
    """The loss of a batch with many `#` is NaN."""
    from triform.tasks import TokenPrediction

    terms = TokenPrediction.terms

    def poisoned(self, outputs, batch, ctx):
        many = (batch["targets"] == ord("#") + 3).sum() > 4
        found = terms(self, outputs, batch, ctx)
        if not ctx.train:
            return found
        return {k: jnp.where(many, jnp.nan, x) for k, x in found.items()}

    monkeypatch.setattr(TokenPrediction, "terms", poisoned)


def losses(workdir):
    lines = metrics.read_lines(str(workdir))
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


def meta_of(workdir, step=STEPS):
    where = str(workdir / "checkpoints")
    with Checkpointer(where, CheckpointConfig()) as checkpointer:
        arrays, meta = saved.read(checkpointer, step)
    for x in arrays.values():
        assert np.isfinite(x.astype(np.float64)).all()
    return meta["recovery"]


def test_a_bad_step_and_what_is_behind_it_change_no_byte():
    @jax.jit
    def step(state, fed):
        def plain(state, batch, across):
            new = state.replace(step=state.step + 1, params=state.params + batch)
            one = jnp.float32(1)
            measured = {"loss": metrics.Mean(batch, one)}
            return new, measured | {"grad_norm": metrics.Mean(one, one)}

        return guard.guarded(plain, RecoveryConfig())(state, fed, None)

    from triform.experiment import TrainState

    def fed(loss, number, limit=math.inf):
        return {
            "batch": jnp.float32(loss),
            "step": np.int32(number),
            "limit": np.float32(limit),
        }

    state = TrainState(jnp.int32(0), jnp.float32(1), {}, {}, {}, jax.random.key(0))
    for loss in (math.nan, math.inf, 5.0):
        same, measured = step(state, fed(loss, 1, limit=4.0))
        same, _ = step(same, fed(2.0, 2))  # it was under way already
        assert (int(same.step), float(same.params)) == (0, 1.0)
        assert measured[guard.DONE].value() == 0
        left, measured = step(guard.passed(same), fed(2.0, 2))
        assert (int(left.step), float(left.params)) == (2, 3.0)
        assert measured[guard.DONE].value() == 1


def test_a_spike_is_judged_by_the_steps_up_to_the_last_but_one():
    config = RecoveryConfig(spike=3.0, window=4)
    watch = guard.Watch(config, {})
    for step, loss in enumerate([5.0, 1.0, 2.0, 3.0, 4.0, 90.0], start=1):
        watch.take(step, loss)
    expected = np.mean([1, 2, 3, 4]) + 3 * np.std([1, 2, 3, 4])
    assert watch.limit(7) == pytest.approx(expected)
    assert watch.limit(5) == math.inf  # fewer than `window` are known
    again = guard.Watch(config, json.loads(json.dumps(watch.saved())))
    assert again.limit(7) == watch.limit(7)
    watch.left_out = [2, 3, 7]
    assert [watch.position(s) for s in range(6)] == [0, 1, 4, 5, 6, 8]


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_run_goes_on_without_bad_batches_and_resumes_bitwise(
    action, config, brittle, tmp_path, capsys
):
    config.recovery = RecoveryConfig(action=action, leave_out=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(config, str(whole))
    said = capsys.readouterr().out
    assert "train/loss is nan on examples" in said
    known = meta_of(whole)
    assert known["bad"] >= 1
    found = losses(whole)
    assert all(np.isfinite(x) for x in found.values())
    bad = sorted(int(x.removeprefix("step_")) for x in os.listdir(whole / "capsules"))
    if action == "skip":
        assert set(range(1, STEPS + 1)) - set(found) == set(bad)
        assert "its update is skipped" in said
    else:
        assert [*found] == list(range(1, STEPS + 1))
        assert len(known["left_out"]) == known["bad"]
        assert "going back to step" in said
    # Interrupted at the first bad step, which nobody has looked at yet.
    asked = []

    def stop():
        asked.append(1)
        return "enough" if len(asked) > bad[0] + 1 else ""

    assert not train.run(config, str(parts), stop=stop)
    train.run(config, str(parts))
    one, other = kill_harness.contents(whole), kill_harness.contents(parts)
    steps = {k.split("/")[0] for k in one if "/" in k}
    for name in one:
        if name.split("/")[0] in steps or name == "metrics.jsonl":
            assert one[name] == other[name], name


def test_too_many_bad_steps_stop_a_run(config, brittle, tmp_path):
    config.recovery = RecoveryConfig(action="skip", most=0)
    with pytest.raises(UserError, match="bad step 1, recovery.most=0"):
        train.run(config, str(tmp_path / "run"))


def test_a_bad_step_can_be_replayed_and_names_the_module(config, tmp_path):
    config.plugins = (str(tmp_path / "plugin.py"),)
    config.model.trunk.ffn = "brittle"
    config.optim.learning_rate = 1e30  # the first update makes what overflows
    config.optim.warmup_steps = 1
    run = tmp_path / "run"
    with pytest.raises(UserError, match="tools replay .*step_2") as caught:
        train.run(config, str(run))
    text = capsule.replay(str(run / "capsules" / "step_2"))
    facts = json.loads((run / "capsules" / "step_2" / "capsule.json").read_text())
    assert f"first in {facts['first']}" in str(caught.value)
    assert f"not finite: {facts['first']}" in text
    assert f"train/loss: {facts['measured']['train/loss']} here" in text
    assert facts["examples"] in text
    assert set(facts["norms"]) and facts["batch"] == 1


def test_norms_of_what_is_large_and_finite_are_finite():
    large = {"a": jnp.full(4, 1e30), "b": jnp.array([3.0, 4.0]), "c": jnp.zeros((0,))}
    found = capsule.norms(large | {"d": jnp.array([1.0, jnp.nan])})
    assert found["a"] == pytest.approx(2e30) and found["b"] == pytest.approx(5)
    assert found["c"] == 0 and math.isnan(found["d"])


class Net(nn.Module):
    """Two layers, the second of which overflows for large inputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="first")(x)
        return nn.Dense(3, name="last")(Exp(name="middle")(x))


class Exp(nn.Module):
    """exp."""

    @nn.compact
    def __call__(self, x):
        return jnp.exp(x)


def test_the_first_module_in_order_of_computation_is_named():
    net = Net()
    params = net.init(jax.random.key(0), jnp.ones((1, 2)))
    assert first_nonfinite(lambda: net.apply(params, jnp.ones((1, 2)))) == ""
    large = jnp.full((1, 2), 1e5)
    ruined = jax.tree.map(jnp.abs, params)
    assert first_nonfinite(lambda: net.apply(ruined, large)) == "middle"


def test_a_layer_of_a_scanned_trunk_has_its_number(config):
    """Of one that is rematerialised, too, where blocks are traced."""
    trunk = config.model.trunk
    trunk.scan_layers, trunk.remat, config.optim.accumulate = True, True, 1
    experiment = Experiment(config.resolved())
    state = jax.jit(experiment.make_state)()
    params = flatten_dict(state.params, sep="/")
    name = "decoder/layers/layer_0/feed_forward/up/kernel"
    params[name] = params[name].at[1].set(jnp.nan)
    ruined = state.replace(params=unflatten_dict(params, sep="/"))
    batch = experiment.put(experiment.empty_batch(config.data.shapes()[0]))
    found = capsule.first_bad(experiment, ruined, batch)
    assert found == "decoder/layer_1/feed_forward/up"


def test_layers_of_a_loop_are_counted_in_turns():
    layers = dict.fromkeys(("a/layers/layer_0", "a/layers/layer_1"), 3)
    calls = Counter(layers | {"a/layers/layer_1/up": 2})
    assert looped("a/layers/layer_1/up", calls) == "a/layer_5/up"
    assert looped("a/layer_1/up", calls) == "a/layer_1/up"
