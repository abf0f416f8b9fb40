"""Attention: `dot` against float64 NumPy, and what Attention makes of its config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import attention_reference

from triform.models.algorithms import ALGORITHMS
from triform.models.algorithms.dot import dot
from triform.models.attention import Attention
from triform.models.mask import Mask

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 7, 4, 16
SCALE = WIDTH**-0.5  # a power of two: scaling is exact in every format


def arrays(kv_heads=HEADS, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, QUERIES, HEADS, WIDTH), *[(BATCH, KEYS, kv_heads, WIDTH)] * 2]
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def make_mask(**options):
    """Queries at positions 2 .. 6 of the keys' 0 .. 6."""
    keys = jnp.broadcast_to(jnp.arange(KEYS), (BATCH, KEYS))
    return Mask(keys[:, KEYS - QUERIES :], keys, **options)


q_segments = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
kv_segments = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0]])
MASKS = {
    "everything": make_mask(),
    "causal": make_mask(causal=True),
    "window": make_mask(window=2),
    "causal window": make_mask(causal=True, window=3),
    "segments": make_mask(q_segments=q_segments, kv_segments=kv_segments),
    "pattern": make_mask(pattern=lambda i, j: (i + j) % 2 == 0),
}


CASES = (  # mask, rows of the bias, key heads: every pair of them, not every triple
    ("everything", 0, HEADS),
    ("everything", 1, 1),
    ("causal", 0, 2),
    ("causal", 1, HEADS),
    ("window", 0, 1),
    ("causal window", BATCH, HEADS),
    ("segments", 0, HEADS),
    ("segments", 1, 2),
    ("segments", BATCH, 1),
    ("pattern", BATCH, 2),
)


@pytest.mark.parametrize(("name", "bias_rows", "kv_heads"), CASES)
def test_dot_equals_float64(name, bias_rows, kv_heads):
    mask, args = MASKS[name], arrays(kv_heads)
    rng = np.random.default_rng(1)
    if bias_rows:
        shape = (bias_rows, HEADS, QUERIES, KEYS)
        args.append(rng.standard_normal(shape).astype(np.float32))
    out_grad = rng.standard_normal(args[0].shape).astype(np.float32)

    @jax.jit
    def run(*args):
        def f(q, k, v, bias=None):
            return dot(q, k, v, mask, scale=SCALE, bias=bias)

        out, back = jax.vjp(f, *args)
        return out, back(out_grad)

    out, grads = run(*args)
    allowed, bias = np.asarray(mask.allowed()), args[3] if bias_rows else None
    expected, expected_grads = attention_reference(
        *args[:3], allowed, bias, out_grad, SCALE
    )
    # Sums of at most 7 x 16 products of numbers of size 1 to 4, in float32.
    for got, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    mask = make_mask(q_segments=q_segments, kv_segments=kv_segments)
    blind = ~np.asarray(mask.allowed()).any(-1)
    assert blind.any()

    def f(q, k, v):
        return dot(q, k, v, mask, scale=SCALE)

    @jax.jit
    def run(*args):
        out, back = jax.vjp(f, *args)
        return out, back(jnp.ones_like(out))

    out, (dq, dk, dv) = run(*arrays())
    assert not np.asarray(out)[blind].any()
    assert not np.asarray(dq)[blind].any()
    # The last key is padding: nobody sees it.
    assert not np.asarray(dk)[:, -1].any()
    assert not np.asarray(dv)[:, -1].any()
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


def test_scores_of_any_size_stay_finite():
    q, k, v = arrays()

    def f(q, k, v):
        return dot(1e4 * q, 1e4 * k, v, MASKS["causal"], scale=SCALE).sum()

    value, grads = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() for x in (value, *grads))


@pytest.mark.parametrize("name", ["everything", "causal"])
def test_bfloat16_loses_only_the_rounding_of_weights_and_output(name):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    out = dot(q, k, v, MASKS[name], scale=SCALE)
    assert out.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float64) for x in (q, k, v)]
    allowed = np.asarray(MASKS[name].allowed())
    expected, _ = attention_reference(*exact, allowed, None, np.zeros(out.shape), SCALE)
    # Two roundings of relative size 2^-9, of the weights (which sum to 1) and the sum.
    bound = 2 * 2**-9 * np.abs(exact[2]).max()
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= bound


def test_dropout_of_weights_keeps_the_expectation():
    q, k, v = arrays()
    mask, rate, draws = MASKS["causal"], 0.3, 1000

    @jax.jit
    @jax.vmap
    def drop(rng):
        return dot(q, k, v, mask, scale=SCALE, rng=rng, dropout=rate)

    plain = dot(q, k, v, mask, scale=SCALE)
    samples = np.asarray(drop(jax.random.split(jax.random.key(0), draws)))
    error = samples.std(0) / draws**0.5
    assert samples.std(0).min() > 0.01  # something was dropped everywhere
    assert (np.abs(samples.mean(0) - plain) < 5 * error).all()
    off = dot(q, k, v, mask, scale=SCALE, rng=None, dropout=rate)
    np.testing.assert_array_equal(off, plain)


def attention_layer(config, seed=0):
    """(module, x, mask, variables) of a layer over a causal sequence."""
    x = jax.random.normal(jax.random.key(seed), (2, 6, config.d_model))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = Mask.self_attention(positions, causal=True)
    layer = Attention(config)
    variables = jax.jit(layer.init)(jax.random.key(1), x, x, mask)
    return layer, x, mask, variables


def test_the_algorithm_is_that_of_the_table(tiny_config, monkeypatch):
    seen = []

    def uniform(q, k, v, mask, *, scale, bias=None, rng=None, dropout=0.0):
        """Attends to all allowed keys alike."""
        seen.append(scale)
        return dot(0 * q, k, v, mask, scale=scale)

    monkeypatch.setitem(ALGORITHMS, "uniform", uniform)
    config = tiny_config(attention="uniform", attention_options=("scale", 0.25)).trunk
    layer, x, mask, variables = attention_layer(config)
    out, _ = jax.jit(layer.apply)(variables, x, x, mask)
    assert set(seen) == {0.25}
    p = jax.tree.map(np.asarray, variables["params"])
    value = np.einsum("bld,dhe->blhe", x, p["value"]["kernel"]) + p["value"]["bias"]
    means = np.cumsum(value, 1) / np.arange(1, 7)[:, None, None]
    expected = np.einsum("blhe,hed->bld", means, p["out"]["kernel"])
    np.testing.assert_allclose(out, expected + p["out"]["bias"], atol=2e-6)


def test_attention_dropout_needs_its_rng(tiny_config):
    layer, x, mask, variables = attention_layer(tiny_config().trunk)
    config = tiny_config(attention_dropout=0.5).trunk
    dropped = Attention(config)
    rngs = {"dropout": jax.random.key(0)}
    plain = layer.apply(variables, x, x, mask, rngs=rngs)[0]
    np.testing.assert_array_equal(dropped.apply(variables, x, x, mask)[0], plain)
    assert (dropped.apply(variables, x, x, mask, rngs=rngs)[0] != plain).any()
