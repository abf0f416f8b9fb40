"""Schedules, decay by path, optimisers and the moving average."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from triform import models, tasks
from triform.runtime import optim
from triform.runtime.optim import OPTIMIZERS, SCHEDULES, OptimConfig
from triform.runtime.parameters import ROWS
from triform.runtime.paths import path_name
from triform.tasks import Context, TokenPredictionConfig

DECAYING = [name for name in OPTIMIZERS if name != "adam"]


def schedule(name, steps=1000, **fields):
    config = OptimConfig(schedule=name, **{"warmup_steps": 100, **fields})
    config.validate()
    return optim.learning_rate(config, steps)


# --- Schedules ---


def test_rsqrt_is_the_papers_formula_one_step_on():
    width, warmup = 512, 4000
    rate = schedule(
        "rsqrt", learning_rate=(width * warmup) ** -0.5, warmup_steps=warmup
    )
    for t in (0, 1, 3998, 3999, 4000, 99_999):
        # Vaswani et al. 2017, eq. 3, whose first step is number 1.
        expected = width**-0.5 * min((t + 1) ** -0.5, (t + 1) * warmup**-1.5)
        assert float(rate(t)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_counts_and_the_peak_is_the_rate(name):
    rate = schedule(name, learning_rate=0.5)
    assert float(rate(0)) == pytest.approx(0.5 / 100)
    assert float(rate(49)) == pytest.approx(0.5 / 2)
    assert float(rate(99)) == pytest.approx(0.5)
    assert max(float(rate(t)) for t in range(0, 1000, 3)) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_ends_at_the_floor(name, floor):
    rate = schedule(name, learning_rate=2.0, floor=floor)
    for t in (1000, 5000):
        assert float(rate(t)) == pytest.approx(2.0 * floor, abs=1e-6)
    last = float(rate(999))  # the last update of 1000
    assert 2.0 * floor < last < 2.0 * floor + 0.02


@pytest.mark.parametrize(
    ("name", "t", "share"),
    [
        ("cosine", 550, 0.1 + 0.9 / 2),  # half of the way from 100 to 1000
        ("cosine", 325, 0.1 + 0.9 * (1 + 0.5**0.5) / 2),
        ("linear", 550, 0.1 + 0.9 / 2),
        ("linear", 325, 0.1 + 0.9 * 3 / 4),
        ("constant", 550, 1.0),
        ("constant", 5000, 1.0),
        ("wsd", 819, 1.0),  # the last fifth begins at 820
        ("wsd", 910, 0.1 + 0.9 / 2),
    ],
)
def test_in_between(name, t, share):
    rate = schedule(name, learning_rate=3.0, floor=0.1)
    assert float(rate(t)) == pytest.approx(3.0 * share, rel=1e-5)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "rsqrt"])
def test_no_warm_up_starts_at_the_peak(name):
    assert float(schedule(name, warmup_steps=0, learning_rate=1.0)(0)) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_traced_and_plain_steps_agree(name):
    rate = schedule(name)
    steps = np.array([0, 99, 100, 700, 1200])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(rate))(steps), [float(rate(int(t))) for t in steps], rtol=1e-5
    )


# --- Which parameters ---


def shapes(config):
    batch = {
        name: jnp.zeros((1, 2), jnp.int32)
        for name in ("encoder_inputs", "encoder_segments", "inputs")
    }
    init = models.build(config).init
    return jax.eval_shape(init, jax.random.key(0), batch)["params"]


def flat(tree, is_leaf=None):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {path_name(path): x for path, x in leaves}


def looped_name(name):
    return name.replace("layers/layer_0/", "layer_0/")


@pytest.fixture(scope="module")
def both_shapes(tiny_config):
    """Shapes of a looped model of one layer and of the scanned one."""
    fields = {"tie_head": False, "positions": "learned", "norm_position": "pre"}
    return [shapes(tiny_config(**fields, scan_layers=scan)) for scan in (False, True)]


def test_decay_is_by_path_looped_and_scanned(both_shapes):
    loop, scan = (flat(optim.decay_mask(ROWS)(x)) for x in both_shapes)
    assert {looped_name(k): v for k, v in scan.items()} == loop
    for name, decays in loop.items():
        assert decays == name.endswith(("kernel", "embedding")), name
    # What deciding by rank would get wrong is there.
    assert flat(both_shapes[0])["encoder/layer_0/self_attention/query/bias"].ndim == 2


def test_muon_orthogonalises_kernels_as_matrices_from_inputs_to_outputs(both_shapes):
    for tree, lead in zip(both_shapes, (0, 1), strict=True):
        found = flat(
            optim.muon_dimensions(ROWS)(tree),
            lambda x: x is None or hasattr(x, "_fields"),
        )
        for name, x in flat(tree).items():
            dims, layer = found[name], "layer_0" in name
            if not (layer and name.endswith("kernel")):
                assert dims is None, name
                continue
            sizes = [
                int(np.prod([x.shape[a] for a in axes]))
                for axes in (dims.reduction_axis, dims.output_axis)
            ]
            assert sorted((*dims.reduction_axis, *dims.output_axis)) == list(
                range(lead, x.ndim)
            )
            expected = {"up": [8, 12], "down": [12, 8]}.get(name.split("/")[-2], [8, 8])
            assert sizes == expected, name
            if "/out/" in name:  # [H, E, D]
                assert dims.output_axis == (lead + 2,)
            elif "attention" in name:  # [D, H, E]
                assert dims.reduction_axis == (lead,)


def numbers(tree):
    """Positive values, so that every decayed parameter must fall."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.5 + rng.random(x.shape), jnp.float32), tree
    )


@pytest.mark.parametrize("scan", [0, 1])
@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_shrinks_all_but_biases_and_scales(both_shapes, name, scan):
    """Decoupled: with no gradient, by rate x weight_decay of the value and no more."""
    params = numbers(both_shapes[scan])
    rate, decay = 0.1, 0.5
    fields = {"schedule": "constant", "warmup_steps": 0, "learning_rate": rate}
    config = OptimConfig(name, weight_decay=decay, **fields)
    config.validate()
    chain = optim.build(config, steps=10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(
        lambda params: chain.update(zeros, chain.init(params), params)
    )(params)
    for path, update in flat(updates).items():
        kept = path.endswith(("bias", "scale"))
        expected = 0 * update if kept else -rate * decay * flat(params)[path]
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)


# --- Learning ---


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_lowers_a_quadratic(name):
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": rng.standard_normal((6, 5)), "bias": np.ones(5)},
        "embedding": rng.standard_normal((7, 6)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    config = OptimConfig(name, learning_rate=0.05, schedule="cosine", warmup_steps=5)
    chain = optim.build(config, steps=200)

    def loss(params):
        return sum(((x - 0.3) ** 2).sum() for x in jax.tree.leaves(params))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = chain.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, chain.init(params)), None, length=200)[0][0]

    assert loss(train(params)) < 0.05 * loss(params)


def test_a_model_learns_with_its_optimiser(tiny_config, pair_batch):
    batch = pair_batch([4, 3, 2], [4, 2, 3], 4)
    model = models.build(tiny_config())
    task = tasks.build(TokenPredictionConfig(label_smoothing=0.0), model)
    config = OptimConfig(
        "adamw", 0.02, warmup_steps=10, weight_decay=0.01, clip_norm=1.0, ema_decay=0.9
    )
    chain = optim.build(config, steps=60)

    def loss(params):
        ctx = Context(0, {})
        outputs, _ = task.outputs({"params": params}, batch, ctx)
        total = task.terms(outputs, batch, ctx)["token"]
        return total / task.weights(batch)["token"]

    @jax.jit
    def train(rng):
        params = task.init(rng, batch)["params"]

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = chain.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, chain.init(params)), None, length=60)[1]

    losses = train(jax.random.key(0))
    assert losses[-1] < 0.5 * losses[0]


# --- Clipping and the moving average ---


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_clipping_is_by_the_global_norm(clip):
    config = OptimConfig(clip_norm=clip, eps=1e6)  # so large that adam is linear
    chain = optim.build(config, steps=10)
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    grads = {"a": jnp.array([3.0, 0, 0]), "b": jnp.array([[0, 4.0], [0, 0]])}
    factor = min(1.0, clip / 5.0) if clip else 1.0
    updates, _ = chain.update(grads, chain.init(params), params)
    plain = optim.build(dataclasses.replace(config, clip_norm=0.0), steps=10)
    expected, _ = plain.update(grads, plain.init(params), params)
    for name in grads:
        np.testing.assert_allclose(updates[name], factor * expected[name], rtol=1e-5)


def test_the_moving_average_is_the_loop():
    fields = {"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1}
    config = OptimConfig("adamw", ema_decay=0.5, weight_decay=0.1, **fields)
    chain = optim.build(config, steps=100)
    params = {"embedding": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    state = chain.init(params)
    average = jax.tree.map(np.asarray, params)
    for t in range(12):
        grads = jax.tree.map(lambda x: 2 * x + 1, params)
        updates, state = chain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        d = min(0.5, (1 + t) / (10 + t))
        average = {k: d * average[k] + (1 - d) * params[k] for k in params}
        used = optim.evaluation_params(params, state)
        for name in params:
            np.testing.assert_allclose(used[name], average[name], rtol=1e-5)
    assert (np.abs(average["embedding"] - params["embedding"]) > 1e-3).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_an_average_evaluation_uses_the_parameters(name):
    params = {"dense": {"kernel": jnp.ones((2, 2))}}
    state = optim.build(OptimConfig(name), steps=10).init(params)
    assert optim.evaluation_params(params, state) is params


def test_the_average_does_not_change_training():
    params, grads = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.full((2, 3), 0.2)}
    updates = []
    for decay in (0.0, 0.9):
        chain = optim.build(OptimConfig(ema_decay=decay, clip_norm=1.0), steps=10)
        updates.append(chain.update(grads, chain.init(params), params)[0]["kernel"])
    np.testing.assert_array_equal(*updates)


def test_adam_has_no_weight_decay_to_set():
    message = "optim.weight_decay=0.1: adam has none; set optim.name=adamw"
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimConfig("adam", weight_decay=0.1).validate()
