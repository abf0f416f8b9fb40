"""The encoder-decoder: no dead field, cached = full, packed = separate, scan = loop."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from laws import (
    CLOSE,
    assert_decoding_equals_the_full_pass,
    assert_trees_close,
    flat,
    init,
    program,
    value_and_grad,
)

from triform import models
from triform.models import EncoderDecoderConfig
from triform.models.config import TransformerConfig
from triform.models.feed_forward import FFNS, FeedForward
from triform.models.positions import sinusoidal_table
from triform.models.stacking import looped_layers, stacked_layers


def applied(config):
    """(variables, batch, ...) -> the logits of targets."""
    model = models.build(config)
    return jax.jit(lambda *args, **options: model.apply(*args, **options)["targets"])


# --- Law 1: no dead field ---


# Field: another value.
MODEL_CHANGES = {
    "vocab_size": 13,
    "share_embeddings": False,
    "tie_head": False,
    "head_bias": True,
    "embedding_scale": "none",
}


@pytest.fixture(scope="module")
def programs(tiny_config, pair_batch):
    @functools.cache
    def of(**fields):
        return program(tiny_config(**fields), pair_batch([3, 4], [4, 3], 4))

    return of


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(TransformerConfig)]
)
def test_every_trunk_field_changes_the_program(programs, tiny_config, another, name):
    # Some are read with certain others only.
    needed = {"rope": {"positions": "rotary"}, "remat_keeps": {"remat": True}}
    same = needed.get(name, {})
    value = another(tiny_config(**same).trunk, name)
    assert programs(**same, **{name: value}) != programs(**same)


@pytest.mark.parametrize(
    "name",
    [f.name for f in dataclasses.fields(EncoderDecoderConfig) if f.name != "trunk"],
)
def test_every_model_field_changes_the_program(programs, name):
    assert programs(**{name: MODEL_CHANGES[name]}) != programs()


def test_equal_configs_give_equal_programs(tiny_config, pair_batch, programs):
    again = program(tiny_config(), pair_batch([3, 4], [4, 3], 4))
    assert again == programs()


# --- Law 3: cached decoding equals the full pass ---

DECODED = {
    "sinusoidal post-norm": {},
    "learned pre-norm remat": {
        **{"positions": "learned", "norm_position": "pre", "remat": True},
    },
    "no positions, grouped, gated": {
        **{"positions": "none", "num_kv_heads": 1, "norm": "rms", "ffn": "swiglu"},
        **{"bias": "none", "share_embeddings": False, "tie_head": False},
    },
    "windows": {"num_layers": 2, "windows": (2, 0), "norm_position": "pre"},
    "scanned": {"num_layers": 2, "scan_layers": True, "num_kv_heads": 1},
    "scanned windows": {
        **{"num_layers": 4, "scan_layers": True, "windows": (3, 2)},
        **{"positions": "learned", "norm_position": "pre"},
    },
}
# Position in each slot, -1: empty. Right-padded, left-padded, and ragged prefixes.
SLOTS = np.array(
    [
        [0, 1, 2, 3, 4, -1, -1, -1],
        [-1, -1, -1, 0, 1, 2, 3, 4],
        [0, 1, -1, -1, -1, 2, 3, 4],
        [-1, 0, -1, 1, 2, -1, 3, 4],
    ]
)


@pytest.mark.parametrize("name", DECODED)
def test_cached_decoding_equals_the_full_pass(tiny_config, pair_batch, name):
    config = tiny_config(**DECODED[name])
    batch = pair_batch([5, 2, 4, 1], [5] * 4, 5)
    first, position = assert_decoding_equals_the_full_pass(
        config, batch, batch, SLOTS, CLOSE
    )
    np.testing.assert_array_equal(first, batch["inputs"][:, 0])
    np.testing.assert_array_equal(position, 0)


# --- Law 4: packed = separate, scan = loop, remat = not, past and padding ---


@pytest.mark.parametrize("name", ["learned pre-norm remat", "windows"])
def test_packed_equals_separate(tiny_config, pair_batch, packed, name):
    config = tiny_config(**DECODED[name])
    apply = applied(config)
    sources, targets = (3, 2, 4), (2, 4, 3)
    batch = pair_batch(sources, targets, 5)
    variables = {"params": init(config, batch)}
    separate = apply(variables, batch)

    logits = apply(variables, packed(batch, targets, sources))[0]
    expected = np.concatenate([separate[r, :n] for r, n in enumerate(targets)])
    np.testing.assert_allclose(logits[: sum(targets)], expected, **CLOSE)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("num_layers", "windows"), [(2, ()), (4, (2, 0))])
def test_scan_equals_loop(tiny_config, pair_batch, num_layers, windows):
    fields = {"num_layers": num_layers, "windows": windows, "norm_position": "pre"}
    config = tiny_config(**fields)
    scan_config = tiny_config(**fields, scan_layers=True)
    batch = pair_batch([4, 2], [3, 4], 4)
    params = init(config, batch)
    shapes = jax.eval_shape(models.build(scan_config).init, jax.random.key(0), batch)
    restacked = stacked_layers(params, config.trunk.cycle(), np)
    assert jax.tree.map(jnp.shape, restacked) == jax.tree.map(
        lambda x: x.shape, shapes["params"]
    )
    logits, grads = value_and_grad(config, params, batch)
    scan_logits, scan_grads = value_and_grad(scan_config, restacked, batch)
    assert_trees_close(scan_logits, logits)
    assert_trees_close(looped_layers(scan_grads), grads)


def test_a_scanned_trunk_draws_every_layer_anew(tiny_config, pair_batch):
    model = models.build(tiny_config(num_layers=2, scan_layers=True, dropout=0.5))
    batch = pair_batch([4], [4], 4)

    @jax.jit
    def run(rng):
        variables = model.init(rng, batch)
        _, seen = model.apply(
            variables,
            batch,
            rngs={"dropout": rng},
            mutable="intermediates",
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        )
        return variables["params"]["encoder"], seen["intermediates"]["encoder"]

    params, seen = run(jax.random.key(0))
    for name, x in flat(params).items():
        if name.endswith("kernel"):
            assert (x[0] != x[1]).all(), name
    masks = {k: np.asarray(x) == 0 for k, x in flat(seen["layers"]).items()}
    assert len(masks) == 2
    for name, dropped in masks.items():
        assert (dropped[0] != dropped[1]).any(), name


@pytest.mark.parametrize("scan", [False, True])
def test_remat_equals_none_with_the_same_dropout(tiny_config, pair_batch, scan):
    fields = {"num_layers": 2, "dropout": 0.3, "attention_dropout": 0.3}
    fields["scan_layers"] = scan
    config, batch = tiny_config(**fields), pair_batch([4, 2], [3, 4], 4)
    params, rng = init(config, batch), jax.random.key(3)
    logits, grads = value_and_grad(config, params, batch, rng)
    again = value_and_grad(tiny_config(**fields, remat=True), params, batch, rng)
    assert_trees_close(again[0], logits)
    assert_trees_close(again[1], grads)


def test_dropout_is_on_exactly_with_its_rng(tiny_config, pair_batch):
    config, batch = tiny_config(dropout=0.5), pair_batch([4], [4], 4)
    variables = {"params": init(config, batch)}
    apply = applied(config)
    rngs = [{"dropout": jax.random.key(i)} for i in range(2)]
    plain = applied(tiny_config())
    off = plain(variables, batch, rngs=rngs[0])
    np.testing.assert_allclose(apply(variables, batch), off, **CLOSE)
    first, second = (apply(variables, batch, rngs=r) for r in rngs)
    assert (np.abs(first - off) > 1e-3).any()
    assert (np.abs(first - second) > 1e-3).any()


@pytest.mark.parametrize("name", ["sinusoidal post-norm", "windows"])
def test_a_future_token_cannot_change_the_past(tiny_config, pair_batch, name):
    config = tiny_config(**DECODED[name])
    length = 6
    batch = pair_batch([4] * (length + 1), [length] * (length + 1), length)
    batch = {k: np.repeat(x[:1], length + 1, 0) for k, x in batch.items()}
    for t in range(length):  # row t differs from the last row from position t on
        batch["inputs"][t, t:] = (batch["inputs"][t, t:] + 1) % 11
    apply = applied(config)
    logits = apply({"params": init(config, batch)}, batch)
    for t in range(length):
        np.testing.assert_allclose(logits[t, :t], logits[-1, :t], rtol=0, atol=1e-6)
        assert (np.abs(logits[t, t:] - logits[-1, t:]).max(-1) > 1e-3).all()


def test_padding_of_the_source_cannot_change_anything(tiny_config, pair_batch):
    config = tiny_config(share_embeddings=False, tie_head=False)
    batch = pair_batch([4, 2, 0], [4, 3, 4], 4, vocab=9)
    batch["weights"][2] = 0  # a row of padding only
    params = init(config, batch)
    real = batch["encoder_segments"] > 0
    # Ids 9 and 10 are nowhere but in padding.
    garbage = np.where(real, batch["encoder_inputs"], [[9, 10, 9, 10]])
    logits, grads = value_and_grad(config, params, batch)
    other, other_grads = value_and_grad(
        config, params, batch | {"encoder_inputs": garbage}
    )
    assert_trees_close(other, logits, close=0)
    assert all(np.isfinite(x).all() for x in flat(other_grads).values())
    used = np.unique(batch["encoder_inputs"][real])
    for g in (grads, other_grads):
        unused = np.delete(g["embedding"]["embedding"], used, 0)
        assert not unused.any()
        assert np.abs(g["embedding"]["embedding"][used]).max(-1).all()
    # Padding in front instead of behind: positions say where the words are.
    flipped = {
        "encoder_inputs": garbage[:, ::-1],
        "encoder_segments": batch["encoder_segments"][:, ::-1],
        "encoder_positions": np.repeat(np.arange(4)[::-1][None], 3, 0),
    }
    moved, _ = value_and_grad(config, params, batch | flipped)
    assert_trees_close(moved, logits)


# --- Formulas ---


def gelu(x):
    return x * (1 + math.erf(x / 2**0.5)) / 2


def gelu_tanh(x):  # Hendrycks & Gimpel 2016
    return x * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "geglu": gelu_tanh,
    "swiglu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", FFNS)
def test_feed_forward_is_its_formula(tiny_config, name):
    module = FeedForward(tiny_config(ffn=name).trunk)
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal((1, 3, 8)).astype(np.float32)
    p = jax.tree.map(
        lambda s: rng.standard_normal(s.shape),
        jax.eval_shape(module.init, jax.random.key(0), x)["params"],
    )

    def dense(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    activation, hidden = np.vectorize(ACTIVATIONS[name]), dense(x, "up")
    gated = "gate" in p
    hidden = activation(dense(x, "gate")) * hidden if gated else activation(hidden)
    expected = dense(hidden, "down")
    got = jax.jit(module.apply)({"params": p}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_sinusoids_have_the_papers_wavelengths():
    table = sinusoidal_table(50, 8)
    for position in (0, 1, 7, 49):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)  # 3.5
            assert table[position, i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 4 + i] == pytest.approx(math.cos(angle), abs=1e-6)


# --- Sizes, names, errors ---


def test_the_base_model_has_the_papers_parameters():
    d, f, layers, vocab = 512, 2048, 6, 37_000  # Vaswani et al. 2017, table 3: base
    attention = 4 * (d * d + d)
    feed_forward = (d * f + f) + (f * d + d)
    norm = 2 * d
    encoder = layers * (attention + feed_forward + 2 * norm)
    decoder = layers * (2 * attention + feed_forward + 3 * norm)
    batch = {k: jnp.zeros((1, 2), int) for k in ("encoder_inputs", "inputs")}
    batch["encoder_segments"] = batch["inputs"]
    model = models.build(EncoderDecoderConfig(vocab_size=vocab))
    params = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == vocab * d + encoder + decoder == 63_082_496


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("side", ["encoder_inputs", "inputs"])
def test_too_long_a_sequence_is_refused(tiny_config, pair_batch, positions, side):
    model = models.build(tiny_config(positions=positions, max_len=6))
    shape = jax.ShapeDtypeStruct((1, 7), jnp.int32)
    batch = pair_batch([3], [3], 3) | {side: shape}
    if side == "encoder_inputs":
        batch["encoder_segments"] = shape
    message = "a sequence of 7 tokens exceeds model.trunk.max_len=6; raise it"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(model.init, jax.random.key(0), batch)


@pytest.mark.parametrize("tie_head", [True, False])
def test_bfloat16_keeps_parameters_and_logits_float32(
    tiny_config, pair_batch, tie_head
):
    config = tiny_config(dtype="bfloat16", tie_head=tie_head)
    model, batch = models.build(config), pair_batch([3], [3], 3)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
    assert out["targets"].dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    cache = jax.eval_shape(
        lambda v: model.apply(v, batch, 4, method="start")[0], variables
    )
    assert {x.dtype for x in jax.tree.leaves(cache.blocks)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("scan", [False, True])
def test_parameter_names_are_stable(tiny_config, pair_batch, layer_names, scan):
    """Checkpoints, decay and partition rules match on them."""
    config = tiny_config(
        scan_layers=scan, positions="learned", norm_position="pre", tie_head=False
    )
    config.share_embeddings = False
    params = jax.eval_shape(
        models.build(config).init, jax.random.key(0), pair_batch([3], [3], 3)
    )["params"]
    layer = "layers/layer_0" if scan else "layer_0"
    expected = {
        *("embedding/embedding", "target_embedding/embedding", "head/kernel"),
        *(f"{side}_positions/table/embedding" for side in ("encoder", "decoder")),
        *(f"{s}/norm/{x}" for s in ("encoder", "decoder") for x in ("scale", "bias")),
        *layer_names(config.trunk, ["self_attention"], f"encoder/{layer}/"),
        *layer_names(
            config.trunk, ["self_attention", "cross_attention"], f"decoder/{layer}/"
        ),
    }
    assert set(flat(params)) == expected
