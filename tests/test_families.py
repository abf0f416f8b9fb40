"""Laws 1, 3, 4 for every family besides the 2017 Transformer (test_models.py).

No dead field; cached decoding equals the full pass; packed equals separate, scan equals
loop, remat equals not; past and padding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import CLOSE, assert_trees_close, flat, init, program, value_and_grad

from triform import models
from triform.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    VisionConfig,
)
from triform.models.config import TransformerConfig
from triform.models.positions import (
    RELATIVE_MAX_DISTANCE,
    relative_bucket,
    rotary_frequencies,
    rotate,
    rotation,
)
from triform.models.transformer import looped_layers, stacked_layers
from triform.models.vision import resized_positions

VOCAB, LENGTH = 11, 6
SIZES = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 12, "max_len": 16}
LLAMA = {
    **{"positions": "rotary", "norm": "rms", "norm_position": "pre", "ffn": "swiglu"},
    "bias": "none",
}
T5 = {
    **{"positions": "relative", "norm": "rms", "norm_position": "pre", "bias": "none"},
    **{"attention_scale": 1.0, "init": "t5"},
}
LEARNED = {"positions": "learned", "ffn": "gelu"}


def trunk(**fields):
    return TransformerConfig(**{**SIZES, "dropout": 0.0, **fields})


def lm(tie_head=True, **fields):
    return LanguageModelConfig(trunk(**fields), VOCAB, tie_head)


# Decoder-only, by name.
DECODERS = {
    "gpt2": lm(positions="learned", norm_position="pre", ffn="gelu_tanh", init="depth"),
    "llama": lm(
        False,
        **{**LLAMA, "num_heads": 4, "num_kv_heads": 2, "d_model": 16},
        rope_scaling=("llama3", 4.0, 1.0, 4.0, 8),
    ),
    "mistral": lm(False, **LLAMA, windows=(3,)),
    "qwen2": lm(**{**LLAMA, "bias": "qkv"}, rope_scaling=("linear", 2.0)),
    "yarn, scanned": lm(
        **LLAMA, scan_layers=True, rope_scaling=("yarn", 4.0, 32.0, 1.0, 8, 0.0)
    ),
    "relative, windows": lm(**T5, windows=(2, 0)),
}
T5S = {
    "t5": EncoderDecoderConfig(trunk(**T5), VOCAB, embedding_scale="head"),
    "t5 v1.1": EncoderDecoderConfig(
        trunk(**{**T5, "ffn": "geglu"}, scan_layers=True),
        VOCAB,
        tie_head=False,
        embedding_scale="none",
    ),
    "marian": EncoderDecoderConfig(trunk(ffn="silu"), VOCAB, head_bias=True),
}
ENCODERS = {
    "bert": EncoderConfig(trunk(**LEARNED, init="normal"), VOCAB),
    "roberta": EncoderConfig(
        trunk(**LEARNED), VOCAB, num_types=1, position_offset=2, num_labels=0
    ),
    "classifier": EncoderConfig(
        trunk(**LEARNED, norm_position="pre"), VOCAB, masked_head=False, num_labels=5
    ),
    "tagger": EncoderConfig(
        trunk(**LEARNED), VOCAB, masked_head=False, num_tags=3, num_labels=0
    ),
    "relative encoder": EncoderConfig(trunk(**T5), VOCAB, num_types=0),
}
VISIONS = {
    "vit": VisionConfig(
        trunk(**{**LEARNED, "norm_position": "pre", "max_len": 10}),
        image_size=12,
        patch_size=4,
        channels=1,
        num_labels=3,
    ),
    "vit, mean": VisionConfig(
        trunk(**{**LEARNED, "norm_position": "pre", "max_len": 9}),
        image_size=12,
        patch_size=4,
        channels=1,
        pool="mean",
        num_labels=3,
    ),
}
FAMILIES = {**DECODERS, **T5S, **ENCODERS, **VISIONS}


def batch_of(config, rows=3, seed=0):
    """A batch that the config's model can read, every row full."""
    rng = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    batch = {"inputs": rng.integers(3, VOCAB, shape).astype(np.int32)}
    if "image" in config.reads:
        size = config.image_size
        image = rng.standard_normal((rows, size, size, config.channels))
        return {"image": image.astype(np.float32)}
    if "encoder_inputs" in config.reads:
        batch["encoder_inputs"] = rng.integers(3, VOCAB, shape).astype(np.int32)
        batch["encoder_segments"] = np.ones(shape, np.int32)
    if getattr(config, "num_types", 0) > 1:
        batch["types"] = rng.integers(0, 2, shape).astype(np.int32)
    return batch


def applied(config):
    return jax.jit(models.build(config).apply)


# --- Law 1 ---

# Family: fields that test_models.py does not meet, or that mean something else here.
CHANGED = {
    "gpt2": {"vocab_size": 13, "tie_head": False},
    "llama": {
        "trunk.rope_base": 100.0,
        "trunk.rope_scaling": ("linear", 2.0),
        "trunk.num_kv_heads": 4,
        "trunk.bias": "qkv",
    },
    "t5": {
        "embedding_scale": "none",
        "trunk.positions": "none",
        "trunk.attention_scale": 0.5,
        "trunk.init": "xavier",
    },
    "marian": {"head_bias": False, "embedding_scale": "none"},
    "bert": {
        "vocab_size": 13,
        "num_types": 3,
        "position_offset": 1,
        "masked_head": False,
        "num_labels": 3,
        "trunk.init": "depth",
        "trunk.dropout": 0.5,
    },
    "tagger": {"num_tags": 4, "trunk.norm_eps": 0.1},
    "vit": {"patch_size": 6, "num_labels": 4, "pool": "mean", "channels": 2},
    "vit, mean": {"image_size": 16},
}


@functools.cache
def base_program(name):
    return program(FAMILIES[name], batch_of(FAMILIES[name]))


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n, fields in CHANGED.items() for f in fields]
)
def test_every_field_changes_the_program(name, field):
    config, value = FAMILIES[name], CHANGED[name][field]
    part, _, key = field.rpartition(".")
    if part:
        changed = dataclasses.replace(
            config, trunk=dataclasses.replace(config.trunk, **{key: value})
        )
    else:
        changed = dataclasses.replace(config, **{key: value})
    if isinstance(changed, VisionConfig):
        changed.trunk = dataclasses.replace(changed.trunk, max_len=changed.tokens())
    changed.validate()
    assert program(changed, batch_of(changed)) != base_program(name)


def test_every_field_of_every_family_is_changed_somewhere():
    for kind in (LanguageModelConfig, EncoderConfig, VisionConfig):
        met = {
            field
            for name, fields in CHANGED.items()
            for field in fields
            if isinstance(FAMILIES[name], kind)
        }
        fields = {f.name for f in dataclasses.fields(kind)} - {"trunk"}
        assert fields <= met, kind


# --- Law 3 ---

# Position in each slot, -1: empty. Right-padded, left-padded, and with holes.
SLOTS = np.array(
    [
        [0, 1, 2, 3, 4, 5, -1, -1],
        [-1, -1, 0, 1, 2, 3, 4, 5],
        [0, 1, -1, 2, 3, -1, 4, 5],
    ]
)


@pytest.mark.parametrize("name", [*DECODERS, *T5S])
def test_cached_decoding_equals_the_full_pass(name):
    config = FAMILIES[name]
    model, batch = models.build(config), batch_of(config)
    params, real = init(config, batch), SLOTS >= 0
    fed = np.where(real, np.take_along_axis(batch["inputs"], SLOTS.clip(0), 1), 9)
    # A prompt, if the model reads one, is a token that is read and never fed again.
    prompt = batch | {"inputs": np.full((len(fed), 1), 9, np.int32)}

    @jax.jit
    def run(params):
        def call(*args, method="__call__"):
            return model.apply({"params": params}, *args, method=method)

        def step(cache, slot):
            tokens, positions = slot
            slot = tokens[:, None], positions[:, None]
            logits, cache = call(*slot, cache, method="extend")
            return cache, logits[:, 0]

        start = call(prompt, SLOTS.shape[1], method="start")[0]
        _, single = jax.lax.scan(step, start, (fed.T, SLOTS.T))
        cache, chunked, at = start, [], 0
        for size in (4, 1, 3):
            part = slice(at, at + size)
            logits, cache = call(fed[:, part], SLOTS[:, part], cache, method="extend")
            chunked.append(logits)
            at += size
        return (
            call(batch)["targets"],
            single.swapaxes(0, 1),
            jnp.concatenate(chunked, 1),
        )

    full, single, chunked = run(params)
    expected = np.take_along_axis(np.asarray(full), SLOTS.clip(0)[..., None], 1)
    for got in (single, chunked):
        np.testing.assert_allclose(got[real], expected[real], rtol=2e-5, atol=1e-5)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("name", DECODERS)
def test_prompts_of_any_padding_are_continued_alike(name):
    """start(prompt), then extend from its last token on, is the full pass."""
    config = FAMILIES[name]
    model, batch = models.build(config), batch_of(config)
    params = init(config, batch)
    kept = np.array([3, 1, 4])  # tokens of each prompt
    widest = 5
    prompt = {k: np.zeros((3, widest), np.int32) for k in ("inputs", "segments")}
    for r, n in enumerate(kept):  # on the left, on the right, in the middle
        at = [0, widest - n, 1][r]
        prompt["inputs"][r, at : at + n] = batch["inputs"][r, :n]
        prompt["segments"][r, at : at + n] = 1

    @jax.jit
    def run(params):
        call = functools.partial(model.apply, {"params": params})
        cache, first, at = call(prompt, LENGTH, method="start")
        found = []
        for _ in range(2):
            logits, cache = call(first[:, None], at[:, None], cache, method="extend")
            found.append(logits[:, 0])
            at = at + 1
            first = jnp.take_along_axis(batch["inputs"], at[:, None], 1)[:, 0]
        return call(batch)["targets"], jnp.stack(found, 1)

    full, found = run(params)
    for r, n in enumerate(kept):
        np.testing.assert_allclose(
            found[r], full[r, n - 1 : n + 1], rtol=2e-5, atol=1e-5
        )


# --- Law 4 ---


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "relative, windows"])
def test_packed_equals_separate(name):
    config, lengths = FAMILIES[name], (3, 2, 5)
    batch = batch_of(config)
    apply, variables = applied(config), {"params": init(config, batch)}
    separate = apply(variables, batch)["targets"]
    inputs = np.concatenate([batch["inputs"][r, :n] for r, n in enumerate(lengths)])
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    packed = {"inputs": inputs, "segments": segments, "positions": positions}
    packed = {k: np.pad(x, (0, 1))[None].astype(np.int32) for k, x in packed.items()}
    logits = apply(variables, packed)["targets"][0]
    expected = np.concatenate([separate[r, :n] for r, n in enumerate(lengths)])
    np.testing.assert_allclose(logits[:-1], expected, **CLOSE)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert", "vit"])
def test_scan_equals_loop_and_remat_equals_not(name):
    config = FAMILIES[name]
    batch = batch_of(config)
    params = init(config, batch)
    expected, grads = value_and_grad(config, params, batch)

    def variant(**fields):
        other = dataclasses.replace(config.trunk, **fields)
        return dataclasses.replace(config, trunk=other)

    scanned = stacked_layers(params, 1)
    got, scan_grads = value_and_grad(variant(scan_layers=True), scanned, batch)
    assert_trees_close(got, expected)
    assert_trees_close(looped_layers(scan_grads), grads)
    got, remat_grads = value_and_grad(variant(remat=True), params, batch)
    assert_trees_close(got, expected)
    assert_trees_close(remat_grads, grads)


@pytest.mark.parametrize("windows", [1, 2])
def test_restacking_layers_is_undone(windows):
    config = lm(num_layers=4)
    params = init(config, batch_of(config))
    again = looped_layers(stacked_layers(params, windows, np))
    assert_trees_close(again, params, close=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "relative, windows"])
def test_a_future_token_cannot_change_the_past(name):
    config = FAMILIES[name]
    batch = batch_of(config, rows=1)
    inputs = np.repeat(batch["inputs"], LENGTH + 1, 0)
    for t in range(LENGTH):  # row t differs from the last row from place t on
        inputs[t, t:] = (inputs[t, t:] + 1) % VOCAB
    variables = {"params": init(config, batch)}
    logits = applied(config)(variables, {"inputs": inputs})["targets"]
    for t in range(LENGTH):
        np.testing.assert_allclose(logits[t, :t], logits[-1, :t], rtol=0, atol=1e-6)
        assert (np.abs(logits[t, t:] - logits[-1, t:]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_cannot_change_anything(name):
    config = FAMILIES[name]
    batch = batch_of(config)
    real = np.arange(LENGTH) < np.array([6, 3, 4])[:, None]
    batch["segments"] = real.astype(np.int32)
    params = init(config, batch)
    apply = applied(config)
    found = apply({"params": params}, batch)
    garbage = {
        k: np.where(real, batch[k], 1).astype(np.int32)
        for k in ("inputs", "types")
        if k in batch
    }
    other = apply({"params": params}, batch | garbage)
    for key, x in found.items():
        kept = real if key == "targets" else slice(None)
        np.testing.assert_array_equal(other[key][kept], x[kept])
        assert np.isfinite(x).all()


def test_predicted_places_are_those_of_all_places():
    config = FAMILIES["bert"]
    batch = batch_of(config)
    apply, variables = applied(config), {"params": init(config, batch)}
    places = np.array([[0, 5, 2], [1, 1, 3], [4, 0, 0]], np.int32)
    every = apply(variables, batch)
    some = apply(variables, batch | {"predict": places})
    expected = np.take_along_axis(np.asarray(every["targets"]), places[..., None], 1)
    np.testing.assert_allclose(some["targets"], expected, **CLOSE)
    np.testing.assert_allclose(some["label"], every["label"], **CLOSE)


def test_too_long_a_row_is_refused_with_its_offset():
    config = EncoderConfig(trunk(**{**LEARNED, "max_len": 7}), VOCAB, position_offset=2)
    with pytest.raises(ValueError, match="6 tokens exceeds 5, model.trunk.max_len"):
        jax.eval_shape(models.build(config).init, jax.random.key(0), batch_of(config))


# --- Formulas ---


def test_rotation_turns_pairs_by_the_angle_of_their_position():
    config = trunk(positions="rotary", head_dim=6)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 2, 6)).astype(np.float32)
    where = np.array([[0, 1, 5, 9]])
    got = rotate(jnp.asarray(x), rotation(config, jnp.asarray(where)))
    for p, position in enumerate(where[0]):
        for i in range(3):  # Su et al. 2021, eq. 15: theta_i = base ** (-2 i / E)
            angle = position * config.rope_base ** (-2 * i / 6)
            turned = (x[0, p, :, i] + 1j * x[0, p, :, i + 3]) * np.exp(1j * angle)
            np.testing.assert_allclose(got[0, p, :, i], turned.real, atol=1e-5)
            np.testing.assert_allclose(got[0, p, :, i + 3], turned.imag, atol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    config = trunk(positions="rotary", head_dim=8)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def product(i, j):
        turn = (rotation(config, jnp.array([[p]])) for p in (i, j))
        return float((rotate(q, next(turn)) * rotate(k, next(turn))).sum())

    for i, j in ((0, 3), (5, 2), (7, 7)):
        assert product(i, j) == pytest.approx(product(i + 11, j + 11), abs=1e-4)


@pytest.mark.parametrize("scaling", [(), ("linear", 4.0)])
def test_linear_scaling_divides_positions(scaling):
    plain = rotary_frequencies(trunk(positions="rotary"))[0]
    found = rotary_frequencies(trunk(positions="rotary", rope_scaling=scaling))[0]
    np.testing.assert_allclose(found * (scaling[1] if scaling else 1), plain)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_are_as_described(bidirectional):
    """Raffel et al. 2020, 2.1: a bucket a distance up to half, then logarithmic."""
    distance = np.arange(-300, 301)
    found = np.asarray(relative_bucket(jnp.asarray(distance), bidirectional))
    half = 16 if bidirectional else 32
    exact = half // 2
    back = found[distance <= 0][::-1]  # by distance into the past
    np.testing.assert_array_equal(back[:exact], np.arange(exact))
    assert (np.diff(back) >= 0).all()
    assert (back[RELATIVE_MAX_DISTANCE:] == half - 1).all()
    assert back[RELATIVE_MAX_DISTANCE // 2] < half - 1
    ahead = found[distance > 0]
    if bidirectional:
        np.testing.assert_array_equal(ahead, back[1:] + half)
    else:
        assert not ahead.any()


def test_positions_of_another_resolution():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((17, 3)).astype(np.float32)
    np.testing.assert_allclose(resized_positions(table, 17), table, atol=1e-6)
    np.testing.assert_array_equal(resized_positions(table, 37)[0], table[0])
    assert resized_positions(table, 36).shape == (36, 3)  # without the class token
    with pytest.raises(ValueError, match="18 places are no square grid"):
        resized_positions(table, 18)
    # A ramp along one side stays one, but for the held edges.
    ramp = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 4, 1)).reshape(16, 1)
    grown = resized_positions(ramp.astype(np.float32), 64).reshape(8, 8)
    inner = np.diff(grown[:, 0])[1:-1]
    np.testing.assert_allclose(inner, 0.5, atol=1e-5)


@pytest.mark.parametrize("name", ["normal", "depth", "t5", "xavier"])
def test_initialisers_have_their_spread(name):
    config = lm(num_layers=3, d_model=256, num_heads=4, d_ff=300, init=name)
    model, batch = models.build(config), {"inputs": jnp.zeros((1, 2), jnp.int32)}
    params = flat(jax.jit(model.init)(jax.random.key(0), batch)["params"])
    layer = "decoder/layer_1"
    width, head, d_ff = 256, 64, 300
    attention, down = "self_attention/out", "feed_forward/down"
    glorot = (2 / (width + width)) ** 0.5
    expected = {
        # Cut at two deviations, which takes an eighth of the spread.
        "normal": {"self_attention/query": 0.0176, attention: 0.0176},
        "depth": {"self_attention/query": 0.02, attention: 0.02 / 6**0.5},
        "t5": {
            "self_attention/query": (width * head) ** -0.5,
            "self_attention/key": width**-0.5,
            down: d_ff**-0.5,
        },
        "xavier": {attention: glorot, down: (2 / (width + d_ff)) ** 0.5},
    }[name]
    for part, spread in expected.items():
        kernel = np.asarray(params[f"{layer}/{part}/kernel"])
        # 65,536 or more draws: 2 % are many standard errors.
        assert kernel.std() == pytest.approx(spread, rel=0.02), part


NAMES = {
    "gpt2": {"embedding/embedding", "positions/table/embedding"},
    "llama": {"embedding/embedding", "head/kernel"},
    "t5": {"embedding/embedding"}
    | {f"{s}/relative_bias/embedding" for s in ("encoder", "decoder")},
    "bert": {
        *("embedding/embedding", "types/embedding", "positions/table/embedding"),
        *(f"embedding_norm/{x}" for x in ("scale", "bias")),
        *(f"masked_head/dense/{x}" for x in ("kernel", "bias")),
        *(f"masked_head/norm/{x}" for x in ("scale", "bias")),
        "masked_bias",
        *(f"{m}/{x}" for m in ("pooler", "label_head") for x in ("kernel", "bias")),
    },
    "vit": {
        *("token", "positions/table/embedding"),
        *(f"{m}/{x}" for m in ("patches", "label_head") for x in ("kernel", "bias")),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names_are_stable(name):
    """Checkpoints, decay, partition rules and weight exchange match on them."""
    config = FAMILIES[name]
    model = models.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch_of(config))["params"]
    outside = {k for k in flat(shapes) if "layer_" not in k and "/norm/" not in k}
    own = {k for k in NAMES[name] if "/norm/" not in k}
    assert outside == own
    assert {k for k in NAMES[name] if "/norm/" in k} <= set(flat(shapes))
