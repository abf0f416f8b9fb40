"""Blocks and patterns by name, and what modules in a block may use of Flax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import batch_of, lm, with_trunk
from flax import linen as nn
from laws import CLOSE, assert_trees_close, flat, init

from triform import models
from triform.models.blocks import BLOCKS
from triform.models.blocks.standard import StandardBlock
from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.patterns import PATTERNS, pattern_of
from triform.models.positions import Relative
from triform.models.stacking import looped_layers, stacked_layers
from triform.models.transformer import Stack

# --- Patterns ---

NUMBERS = {"row": "1:3", "column": "1:3", "conv": "3:1:4"}
EACH_PATTERN = [f"{name}:{NUMBERS.get(name, '3')}" for name in PATTERNS]


def positions(length=12):
    return np.arange(length)[:, None], np.arange(length)[None]


def test_strided_sees_the_last_positions_and_every_stride():
    """Child et al. 2019, 4.2: the union of A(1) and A(2)."""
    i, j = positions()
    seen = np.asarray(pattern_of("strided:4")(i, j)) & (j <= i)
    for q in range(12):
        near = {k for k in range(12) if q - 4 < k <= q}
        far = {k for k in range(q + 1) if (q - k) % 4 == 0}
        assert set(np.flatnonzero(seen[q])) == near | far


def test_fixed_sees_its_block_and_the_last_of_every_block():
    """Child et al. 2019, 4.3 with c = 1."""
    i, j = positions()
    seen = np.asarray(pattern_of("fixed:4")(i, j)) & (j <= i)
    for q in range(12):
        own = {k for k in range(q + 1) if k // 4 == q // 4}
        summary = {k for k in range(q + 1) if k % 4 == 3}
        assert set(np.flatnonzero(seen[q])) == own | summary


@pytest.mark.parametrize("attention", ["dot", "flash"])
@pytest.mark.parametrize("name", EACH_PATTERN)
def test_each_layer_has_its_own_pattern_and_window(name, attention):
    """A key that no layer sees changes nothing; one that a layer sees does."""
    trunk = lm(num_layers=1, positions="none", attention=attention).trunk
    trunk.patterns, trunk.windows = (name,), (5,)
    trunk.validate()
    length = 24
    where = jnp.arange(length)[None]
    mask = Mask.self_attention(where, causal=True, aligned=True)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, length, 8)).astype(np.float32)
    # The plain sum of features is constant after a norm.
    weights = rng.standard_normal(8).astype(np.float32)
    stack = Stack(trunk)
    variables = jax.jit(stack.init)(jax.random.key(0), x, mask)

    def last(x):
        return stack.apply(variables, x, mask)[0][0, -1] @ weights

    seen = np.abs(jax.jit(jax.grad(last))(x)[0]).max(-1) > 0
    both = mask.replace(window=5, pattern=pattern_of(name)).allowed()[0, -1]
    np.testing.assert_array_equal(seen, both)
    assert 1 < both.sum() < 5


def test_patterns_and_windows_cycle_apart():
    trunk = TransformerConfig(
        num_layers=6, windows=(2, 0, 4), patterns=("none", "fixed:2")
    )
    found = [trunk.limits_of(i) for i in range(6)]
    assert trunk.cycle() == 6 and len(set(found)) == 6
    assert found[0] == (2, "none") and found[5] == (4, "fixed:2")
    trunk.scan_layers = True
    trunk.validate()
    trunk.num_layers = 9
    with pytest.raises(ValueError, match="windows=") as error:
        trunk.validate()
    assert "every 6 layers" in str(error.value)


@pytest.mark.parametrize("name", ["strided", "strided:0", "strided:x", "stride:8", ""])
def test_an_unknown_pattern_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="patterns=") as error:
        TransformerConfig(patterns=("none", name)).validate()
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in PATTERNS)


# --- Blocks ---


def test_the_parallel_block_is_its_formula():
    """PaLM (Chowdhery et al. 2022), section 2."""
    config = lm(num_layers=1, block="parallel", norm_position="pre", bias="none")
    batch = batch_of(config)
    params = init(config, batch)
    _, seen = models.build(config).apply(
        {"params": params},
        batch,
        mutable="intermediates",
        capture_intermediates=lambda module, _: module.name != "decoder",
    )
    seen = seen["intermediates"]
    layer = seen["decoder"]["layer_0"]
    (x,) = seen["positions"]["__call__"]
    ((out, _),) = layer["__call__"]
    parts = layer["self_attention"]["__call__"][0][0], layer["feed_forward"]["__call__"]
    np.testing.assert_allclose(out, x + parts[0] + parts[1][0], **CLOSE)
    (y,) = layer["norm"]["__call__"]
    up = params["decoder"]["layer_0"]["feed_forward"]
    hidden = np.maximum(y @ up["up"]["kernel"], 0) @ up["down"]["kernel"]
    np.testing.assert_allclose(parts[1][0], hidden, **CLOSE)


def test_the_query_norm_block_is_its_formula():
    """modules.py and model.py of Kang & McAuley's code, whose norms have an eps of
    1e-8, and whose keys and values are not normalised.
    """
    width, length = 8, 6
    sizes = {"d_model": width, "num_heads": 2, "d_ff": 5, "max_len": length}
    trunk = TransformerConfig(
        1, **sizes, block="query_norm", positions="none", norm_eps=1e-8
    )
    mask = Mask.self_attention(jnp.arange(length)[None], causal=True, aligned=True)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((length, width)).astype(np.float32)
    stack = Stack(trunk)
    params = stack.init(jax.random.key(0), x[None], mask)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    assert "out" not in params["layer_0"]["self_attention"]

    def norm(name, x):
        own = params["layer_0"][f"{name}_norm"]
        x = x - x.mean(-1, keepdims=True)
        return x / x.std(-1, keepdims=True) * own["scale"] + own["bias"]

    def product(name, x):
        part, name = name.split("/")
        own = params["layer_0"][part][name]
        bias = own["bias"].ravel()
        return x @ own["kernel"].reshape(len(x.T), -1) + bias

    query = norm("self_attention", x)
    rows = [("query", query), ("key", x), ("value", x)]
    q, k, v = (
        product(f"self_attention/{name}", y).reshape(length, 2, -1) for name, y in rows
    )
    scores = np.einsum("qhe,khe->hqk", q, k) / 2
    scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -np.inf)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = query + np.einsum("hqk,khe->qhe", shares, v).reshape(length, width)
    z = norm("feed_forward", y)
    hidden = np.maximum(product("feed_forward/up", z), 0)
    expected = z + product("feed_forward/down", hidden)
    # Post-norm: the trunk adds no norm of its own at the end.
    found, _ = jax.jit(stack.apply)({"params": params}, x[None], mask)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


def test_the_query_norm_block_refuses_heads_of_another_width():
    trunk = TransformerConfig(
        1, d_model=8, num_heads=2, head_dim=6, block="query_norm", positions="none"
    )
    with pytest.raises(ValueError, match="head_dim=6") as error:
        trunk.validate()
    assert "d_model=8" in str(error.value) and "head_dim=0" in str(error.value)


def test_dropout_of_the_query_norm_block():
    """On weights of attention, within the feed-forward network and after it."""
    trunk = TransformerConfig(num_layers=1, d_model=8, num_heads=2, block="query_norm")
    mask = Mask.self_attention(jnp.arange(4)[None], causal=True, aligned=True)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 8)).astype(np.float32)
    rest = mask, None, None, Relative(), {"self": None, "cross": None}, None
    variables = BLOCKS["query_norm"](trunk).init(jax.random.key(0), x, *rest)

    def outputs(rates, seed):
        """Of attention, the feed-forward network, its share of the block, the norms."""
        trunk_of = dataclasses.replace(trunk, **rates)
        (out, _), seen = BLOCKS["query_norm"](trunk_of).apply(
            variables,
            *(x, *rest),
            rngs={"dropout": jax.random.key(seed)},
            capture_intermediates=lambda module, _: bool(module.name),
        )
        seen = {k: v["__call__"][0] for k, v in seen["intermediates"].items() if v}
        return {**seen, "added": out - seen["feed_forward_norm"]}

    inner = {"dropout": 0.5, "attention_dropout": 0.0}
    first, second = outputs(inner, 0), outputs(inner, 1)
    np.testing.assert_array_equal(
        first["feed_forward_norm"], second["feed_forward_norm"]
    )
    assert np.abs(first["feed_forward"] - second["feed_forward"]).max() > 0.01
    dropped = np.isclose(first["added"], 0, atol=1e-6)
    assert 0.2 < dropped.mean() < 0.8
    kept = ~dropped
    np.testing.assert_allclose(
        first["added"][kept], 2 * first["feed_forward"][kept], rtol=1e-3, atol=1e-5
    )
    weights = {"dropout": 0.0, "attention_dropout": 0.5}
    first, second = outputs(weights, 0), outputs(weights, 1)
    changed = first["feed_forward_norm"] - second["feed_forward_norm"]
    assert np.abs(changed).max() > 0.01


# --- Collections and rngs of modules in a trunk ---


class Recording(nn.Module):
    """A block that adds to `losses`, keeps a mean in `stats` and adds noise."""

    config: TransformerConfig
    cross: bool
    window: int
    pattern: str

    @nn.compact
    def __call__(self, x, *rest):
        limits = self.cross, self.window, self.pattern
        x, cache = StandardBlock(self.config, *limits, name="inner")(x, *rest)
        self.sow("losses", "size", (x**2).mean())
        mean = self.variable("stats", "mean", jnp.zeros, (x.shape[-1],))
        mean.value = 0.9 * mean.value + 0.1 * x.mean((0, 1))
        if self.has_rng("sample"):
            noise = jax.random.normal(self.make_rng("sample"), (3,))
            self.sow("intermediates", "noise", noise)
        return x, cache


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("windows", [(), (2, 0)])
def test_collections_and_rngs_cross_a_scanned_trunk(monkeypatch, windows, remat):
    monkeypatch.setitem(BLOCKS, "recording", Recording)
    config = lm(num_layers=4, block="recording", windows=windows, remat=remat)
    scanned = with_trunk(config, scan_layers=True)
    cycle, batch = config.trunk.cycle(), batch_of(config)
    params = init(config, batch)

    @jax.jit
    def run(params, stats):
        model = models.build(scanned if "layers" in params["decoder"] else config)
        out, seen = model.apply(
            {"params": params, "stats": stats},
            batch,
            rngs={"sample": jax.random.key(1)},
            mutable=["losses", "stats", "intermediates"],
        )
        return out, seen["losses"], seen["stats"], seen["intermediates"]

    stats = models.build(config).init(jax.random.key(0), batch)["stats"]
    stats = jax.tree.map(lambda x: x + 0.5, stats)
    looped = run(params, stats)
    found = run(*(stacked_layers(x, cycle) for x in (params, stats)))
    assert len(flat(looped[1])) == len(flat(looped[2])) == 4
    for got, expected in zip(found[:3], looped[:3], strict=True):
        assert_trees_close(looped_layers(got), expected)
    # Each layer draws its own.
    for noise in (looped[3], looped_layers(found[3])):
        drawn = [np.asarray(x).tobytes() for x in flat(noise).values()]
        assert len(drawn) == 4 == len(set(drawn))
