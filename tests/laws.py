"""Helpers of the tests that state laws about models: parameters, gradients, trees."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform import models
from triform.models.logits import whole
from triform.runtime import metrics
from triform.runtime.partition import PmapPlacement
from triform.runtime.paths import path_name
from triform.tasks.base import over

# Float32 sums of the same few terms in another order.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
# What a clock measures, in a line of metrics.jsonl.
SPEED = (
    *("train/tokens_per_second", "train/steps_per_second", "train/data_wait", "time"),
    *("train/flops_per_second", "train/mfu"),
)


def flat(tree) -> dict:
    """{path: leaf}."""
    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def init(config, batch):
    """Parameters of which none is trivial, by NumPy: that need not be compiled."""
    model, rng = models.build(config), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]

    def draw(path, x):
        noise = 0.3 * rng.standard_normal(x.shape).astype(np.float32)
        return noise + 1 if path_name(path).endswith("scale") else noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


def program(config, batch) -> str:
    """What is compiled to initialise, run forward and differentiate, with dropout."""
    model = models.build(config)

    def run(batch, rng):
        params = model.init(rng, batch)["params"]

        def loss(params):
            logits = model.apply({"params": params}, batch, rngs={"dropout": rng})
            return sum(over(x, lambda x: (x**2).sum(-1)).sum() for x in logits.values())

        return params, jax.grad(loss)(params)

    return jax.jit(run).lower(batch, jax.random.key(0)).as_text()


def value_and_grad(config, params, batch, rng=None):
    """(logits by name, gradients of a fixed function of them), compiled."""
    model = models.build(config)

    def weighted(logits, weights):
        return jax.nn.log_softmax(logits) * weights

    @jax.jit
    def run(params):
        def loss(params):
            rngs = {} if rng is None else {"dropout": rng}
            logits = model.apply({"params": params}, batch, rngs=rngs)
            # Every logit matters, each in its own way.
            total = sum(
                over(
                    x,
                    weighted,
                    jnp.cos(jnp.arange(math.prod(x.shape))).reshape(x.shape),
                ).sum()
                for x in logits.values()
            )
            return total, {name: whole(x) for name, x in logits.items()}

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logits), grads = run(params)
    return logits, grads


def attention_reference(q, k, v, allowed, bias, out_grad, scale):
    """Output and gradients of (q, k, v, bias) in float64, one head at a time."""
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    dbias = np.zeros((len(q), q.shape[2], q.shape[1], k.shape[1]))
    for b, h in np.ndindex(len(q), q.shape[2]):
        g = h * k.shape[2] // q.shape[2]  # consecutive query heads share a key head
        scores = scale * q[b, :, h] @ k[b, :, g].T
        if bias is not None:
            scores += np.asarray(bias, np.float64)[b % len(bias), h]
        weights = np.where(allowed[b], np.exp(scores), 0)
        total = weights.sum(-1, keepdims=True)
        weights /= np.where(total, total, 1)
        out[b, :, h] = weights @ v[b, :, g]
        dv[b, :, g] += weights.T @ out_grad[b, :, h]
        dweights = out_grad[b, :, h] @ v[b, :, g].T
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True))
        dq[b, :, h] = scale * dscores @ k[b, :, g]
        dk[b, :, g] += scale * dscores.T @ q[b, :, h]
        dbias[b, h] = dscores
    if bias is not None and len(bias) == 1:
        dbias = dbias.sum(0, keepdims=True)
    return out, (dq, dk, dv) + (() if bias is None else (dbias,))


def assert_decoding_equals_the_full_pass(config, batch, prompt, slots, close):
    """Law 3: tokens fed one by one, and in pieces with the rows exchanged on the way.

    `slots` [B, S] are the positions of what is fed in each slot, -1: an empty one.
    """
    model, params, real = models.build(config), init(config, batch), slots >= 0
    tokens = np.take_along_axis(batch["inputs"], slots.clip(0), 1)
    any_id = 9 % config.sizes()["vocab_size"]
    fed = np.where(real, tokens, any_id)
    order = np.roll(np.arange(len(slots)), 1)

    @jax.jit
    def run(params):
        def call(*args, method="__call__"):
            return model.apply({"params": params}, *args, method=method)

        def step(cache, slot):
            tokens, positions = slot
            slot = tokens[:, None], positions[:, None]
            logits, cache = call(*slot, cache, method="extend")
            return cache, logits[:, 0]

        cache, *begin = call(prompt, slots.shape[1], method="start")
        _, single = jax.lax.scan(step, cache, (fed.T, slots.T))
        # Four slots, then less and more than one token, of exchanged rows.
        found, rows, at = [], np.arange(len(slots)), 0
        for size in (4, 1, 3):
            piece = fed[rows, at : at + size], slots[rows, at : at + size]
            logits, cache = call(*piece, cache, method="extend")
            found.append(logits[np.argsort(rows)])
            cache = cache.map_rows(lambda x: x[order])
            rows, at = rows[order], at + size
        full = call(batch)["targets"]
        return full, single.swapaxes(0, 1), jnp.concatenate(found, 1), begin

    full, single, pieces, begin = run(params)
    expected = np.take_along_axis(np.asarray(full), slots.clip(0)[..., None], 1)
    for got in (single, pieces):
        np.testing.assert_allclose(got[real], expected[real], **close)
        assert np.isfinite(got).all()  # in empty slots too
    return begin


def assert_prompts_are_continued(config, batch, order, sizes, close):
    """Law 3: start(prompt), then extend by `sizes` tokens at a time, is the full pass.

    `order` [B, L]: which token of its row is at each position of the prompt, -1: none.
    """
    model, params = models.build(config), init(config, batch)
    tokens = np.take_along_axis(batch["inputs"], order.clip(0), 1)
    prompt = {
        "inputs": np.where(order >= 0, tokens, 9).astype(np.int32),
        "segments": (order >= 0).astype(np.int32),
    }

    @jax.jit
    def run(params):
        def call(*args, **kwargs):
            return model.apply({"params": params}, *args, **kwargs)

        cache, tokens, at = call(prompt, sum(sizes) + 1, method="start")
        # First the prompt's last token.
        logits, cache = call(tokens[:, None], at[:, None], cache, method="extend")
        found = [logits]
        for size in sizes:
            where = at[:, None] + 1 + jnp.arange(size)
            tokens = jnp.take_along_axis(batch["inputs"], where, 1)
            logits, cache = call(tokens, where, cache, method="extend")
            found.append(logits)
            at = where[:, -1]
        return call(batch)["targets"], jnp.concatenate(found, 1)

    full, found = run(params)
    for row, last in enumerate(order.max(1)):
        wanted = full[row, last : last + 1 + sum(sizes)]
        np.testing.assert_allclose(found[row], wanted, **close)


def assert_trees_close(got, expected, close=1e-5):
    """Leaf by leaf, relative to the leaf's largest value."""
    got, expected = flat(got), flat(expected)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        atol = close * max(1.0, float(np.abs(x).max()))
        np.testing.assert_allclose(got[name], x, rtol=0, atol=atol, err_msg=name)


# What differs is the order of float32 sums over some 100 tokens: errors of 1e-6 of the
# largest gradient. Adam's first update is rate * g / (|g| + eps): with eps = rate it
# passes an error of g on at most unchanged.
TOLERANCE = 2e-6


def update(experiment, start, batch):
    """(state after a step, {metric: value}) on the host, however they are placed."""
    placement = experiment.placement
    # Steps donate their state: each gets its own.
    state = jax.tree.map(np.copy, start).replace(rng=jax.random.key(0))
    if not isinstance(placement, PmapPlacement):
        state = jax.device_put(state, placement.shardings(state))
    state = placement.load(state)
    put = experiment.put(batch)
    step = placement.compile_train(experiment.train_step, state, put)
    state, measured = step(state, put)
    state = placement.unload(state)
    found = metrics.values(metrics.to_host(measured), "train")
    rng = np.asarray(jax.random.key_data(state.rng))
    state = jax.tree.map(np.asarray, state.replace(rng=None)).replace(rng=rng)
    return state.replace(step=int(state.step)), found


def assert_same_update(got, expected):
    """Of two results of `update`."""
    (state, found), (want, measured) = got, expected
    found, measured = dict(found), dict(measured)
    assert state.step == want.step == 1
    np.testing.assert_array_equal(state.rng, want.rng)
    # A divergence near 0 is a difference of numbers near 1.
    divergence = "train/teacher_loss"
    if divergence in measured:
        wanted = pytest.approx(measured.pop(divergence), abs=TOLERANCE)
        assert found.pop(divergence) == wanted
    assert found == pytest.approx(measured, rel=1e-5)
    for tree, wanted in (
        (state.params, want.params),
        (state.extra, want.extra),
        (state.opt_state, want.opt_state),  # moments: of the gradients
    ):
        tree, wanted = flat(tree), flat(wanted)
        assert tree.keys() == wanted.keys()
        for name, x in wanted.items():
            np.testing.assert_allclose(
                tree[name], x, rtol=1e-5, atol=TOLERANCE, err_msg=name
            )
