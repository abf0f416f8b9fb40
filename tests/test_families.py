"""Laws 1, 3, 4 for every family besides the 2017 Transformer (test_models.py).

No dead field; cached decoding equals the full pass; packed equals separate, scan equals
loop, remat equals not; past and padding.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
from families import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    LEARNED,
    LENGTH,
    T5S,
    VOCAB,
    applied,
    batch_of,
    lm,
    real_positions,
    trunk,
    with_trunk,
)
from laws import (
    CLOSE,
    assert_decoding_equals_the_full_pass,
    assert_prompts_are_continued,
    assert_trees_close,
    init,
    value_and_grad,
)

from triform import models
from triform.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    VisionConfig,
)
from triform.models.config import TransformerConfig
from triform.models.stacking import looped_layers, stacked_layers

# --- Law 1 ---

# Family: what its own fields are changed to.
CHANGED = {
    "gpt2": {"vocab_size": 13, "tie_head": False},
    "t5": {"embedding_scale": "none", "share_embeddings": False},
    "t5 v1.1": {"vocab_size": 13, "tie_head": True},
    "marian": {"head_bias": False, "embedding_scale": "none"},
    "bert": {
        "vocab_size": 13,
        "num_types": 3,
        "position_offset": 1,
        "masked_head": False,
        "num_labels": 3,
        "pool": "mean",
    },
    "tagger": {"num_tags": 4},
    "esm": {
        "vocab_size": 13,
        "masked_head": False,
        "num_labels": 3,
        "pool": "mean",
        "mask_id": 6,
        "masked_share": 0.2,
    },
    "embedded masks": {"num_tags": 4, "num_types": 2, "position_offset": 1},
    "vit": {"patch_size": 6, "num_labels": 4, "pool": "mean", "channels": 2},
    "vit, mean": {"image_size": 16},
    "lora": {
        "model": DECODERS["llama"],
        "rank": 3,
        "alpha": 8.0,
        "rslora": True,
        "targets": ("kernel$",),
        "ranks": (("query", 3),),
        "dropout": 0.2,
    },
    "distillation": {
        "student": FAMILIES["relative encoder"],
        "teacher": FAMILIES["relative encoder"],
    },
    "autoencoder": {
        "image_size": 16,
        "channels": 2,
        "width": 3,
        "stages": 1,
        "latent": 5,
        "dtype": "bfloat16",
    },
    "discrete vae": {
        "image_size": 16,
        "channels": 2,
        "num_codes": 5,
        "width": 8,
        "stages": 2,
        "blocks": 2,
        "noise": 0.5,
        "dtype": "bfloat16",
    },
    "dalle": {"vocab_size": 13, "num_codes": 14, "text_len": 5, "grid": 2},
    "piano roll": {"num_keys": 7},
    "sasrec": {"num_items": 13, "causal": False, "scale": False, "output_layer": True},
    "contrastive": {
        "text": trunk(),
        "image": trunk(positions="learned", num_layers=1),
        "vocab_size": 13,
        "image_size": 16,
        "patch_size": 2,
        "channels": 2,
        "width": 6,
    },
}
# One of every kind of model and every kind of positions.
WIRINGS = ("gpt2", "llama", "t5 v1.1", "bert", "vit")


def forward(config) -> str:
    """What initialises and what runs forward, with dropout: its jaxpr and constants."""
    model, batch = models.build(config), batch_of(config)

    def run(batch, rng):
        variables = model.init(rng, batch)
        rngs = {"dropout": rng, "sample": rng}
        return variables, model.apply(variables, batch, rngs=rngs)

    closed = jax.make_jaxpr(run)(batch, jax.random.key(0))
    constants = [np.asarray(x).tobytes() for x in closed.consts]
    # Functions in it are printed with their address.
    return re.sub(r"0x[0-9a-f]+", "", str(closed)) + str(constants)


def is_read(config, field):
    """Whether the field of the trunk means anything to this model."""
    positions = config.trunk.positions
    if field == "rope":
        return positions == "rotary"
    if field == "max_len":  # images have the positions of their grid
        return positions == "learned" and not isinstance(config, VisionConfig)
    if field == "logit_chunks":
        return "vocab_size" in config.outputs().values()
    return True


@pytest.mark.parametrize("name", WIRINGS)
def test_every_trunk_field_changes_every_familys_program(another, name):
    config = FAMILIES[name]
    config = with_trunk(config, num_layers=1, scan_layers=False)
    plain, dead = forward(config), []
    assert forward(config) == plain
    for field in (f.name for f in dataclasses.fields(TransformerConfig)):
        if is_read(config, field):
            # Without remat it means nothing.
            base = with_trunk(config, remat=True) if field == "remat_keeps" else config
            value = another(config.trunk, field)
            changed = with_trunk(base, **{field: value})
            changed.validate()
            if forward(changed) == (plain if base is config else forward(base)):
                dead.append(field)
    assert not dead


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_of_a_family_changes_its_program(name):
    config = FAMILIES[name]
    plain, dead = forward(config), []
    assert forward(config) == plain
    for field, value in CHANGED[name].items():
        changed = dataclasses.replace(config, **{field: value})
        changed.validate()
        if forward(changed) == plain:
            dead.append(field)
    assert not dead


def test_every_field_of_every_family_is_changed_somewhere():
    for kind in models.MODELS:
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


# Products of a few layers, in another order.
NEAR = {"rtol": 2e-5, "atol": 1e-5}


@pytest.mark.parametrize(
    "name", [*DECODERS, *T5S, "lora", "lora, scanned", "lora of pairs"]
)
def test_cached_decoding_equals_the_full_pass(name):
    batch = batch_of(FAMILIES[name])
    # A prompt, if the model reads one, is a token that is read and never fed again.
    prompt = batch | {"inputs": np.full((len(SLOTS), 1), 9, np.int32)}
    assert_decoding_equals_the_full_pass(FAMILIES[name], batch, prompt, SLOTS, NEAR)


@pytest.mark.parametrize("name", [*DECODERS, "lora", "lora, scanned"])
def test_prompts_of_any_padding_are_continued_alike(name):
    # Padded on the right, on the left, on both sides, and within.
    order = np.array(
        [[0, 1, 2, -1, -1], [-1, -1, -1, -1, 0], [-1, 0, 1, 2, -1], [0, -1, 1, -1, 2]]
    )
    batch = batch_of(FAMILIES[name], rows=4)
    assert_prompts_are_continued(FAMILIES[name], batch, order, (1, 1), NEAR)


# --- Law 4 ---


PACKED = (
    *("gpt2", "llama", "mistral", "relative, windows", "relative keys", "t5"),
    *("t5 v1.1", "patterns, parallel", "parallel pairs", "bert", "roberta"),
    *("tagger", "relative encoder", "relative keys encoder", "esm", "sasrec"),
    "bert4rec",
)


@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_separate(packed, name):
    config, lengths, sources = FAMILIES[name], (3, 2, 5), ()
    batch = batch_of(config)
    if isinstance(config, EncoderDecoderConfig):
        sources = (4, 6, 1)
        batch["encoder_segments"] = real_positions(*sources)
    else:
        batch["segments"] = real_positions(*lengths)
    apply, variables = applied(config), {"params": init(config, batch)}
    key = next(iter(config.outputs()))
    separate = apply(variables, batch)[key]
    logits = apply(variables, packed(batch, lengths, sources))[key][0]
    expected = np.concatenate([separate[r, :n] for r, n in enumerate(lengths)])
    np.testing.assert_allclose(logits[:-1], expected, **CLOSE)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "llama", "relative, windows", "relative keys", "t5", "bert"),
        "vit",
        *("patterns, parallel", "parallel pairs", "lora"),
    ],
)
def test_scan_equals_loop_and_less_memory_is_the_same(name):
    config = FAMILIES[name]
    batch = batch_of(config)
    params = init(config, batch)
    expected, grads = value_and_grad(config, params, batch)

    scanned = stacked_layers(params, config.trunk.cycle())
    other = with_trunk(config, scan_layers=True)
    got, scan_grads = value_and_grad(other, scanned, batch)
    assert_trees_close(got, expected)
    assert_trees_close(looped_layers(scan_grads), grads)
    other = with_trunk(config, remat=True, remat_keeps="products", logit_chunks=3)
    got, remat_grads = value_and_grad(other, params, batch)
    assert_trees_close(got, expected)
    assert_trees_close(remat_grads, grads)


@pytest.mark.parametrize("windows", [1, 2])
def test_restacking_layers_is_undone(windows):
    config = lm(num_layers=4)
    params = init(config, batch_of(config))
    again = looped_layers(stacked_layers(params, windows, np))
    assert_trees_close(again, params, close=0)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "relative, windows", "t5", "patterns, parallel", "sasrec"]
)
def test_a_future_token_cannot_change_the_past(name):
    config = FAMILIES[name]
    batch = batch_of(config, rows=1)
    batch = {k: np.repeat(x, LENGTH + 1, 0) for k, x in batch.items()}
    inputs = batch["inputs"]
    for t in range(LENGTH):  # row t differs from the last row from position t on
        inputs[t, t:] = (inputs[t, t:] + 1) % VOCAB
    found = applied(config)({"params": init(config, batch)}, batch)
    logits = found[next(iter(config.outputs()))]
    for t in range(LENGTH):
        np.testing.assert_allclose(logits[t, :t], logits[-1, :t], rtol=0, atol=1e-6)
        assert (np.abs(logits[t, t:] - logits[-1, t:]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("name", [*ENCODERS, "bert, predict", "t5", "t5 v1.1"])
def test_padding_cannot_change_anything(name):
    name, _, predict = name.partition(", ")
    config, lengths = FAMILIES[name], (6, 3, 4)
    batch, real = batch_of(config), real_positions(*lengths) > 0
    side = "encoder_" * isinstance(config, EncoderDecoderConfig)
    batch[f"{side}segments"] = real.astype(np.int32)
    if predict:  # real positions
        batch["masked_positions"] = np.array(
            [[5, 0, 2], [2, 1, 0], [0, 3, 3]], np.int32
        )
    params = init(config, batch)
    apply = applied(config)
    found = apply({"params": params}, batch)
    garbage = {
        k: np.where(real, batch[k], 1).astype(np.int32)
        for k in (f"{side}inputs", "token_type_ids")
        if k in batch
    }
    other = apply({"params": params}, batch | garbage)
    for key, x in found.items():
        kept = real if key == "targets" and not (predict or side) else slice(None)
        np.testing.assert_array_equal(other[key][kept], x[kept])
        assert np.isfinite(x).all()


def test_masked_positions_have_the_logits_of_all_positions():
    config = FAMILIES["bert"]
    batch = batch_of(config)
    apply, variables = applied(config), {"params": init(config, batch)}
    chosen = np.array([[0, 5, 2], [1, 1, 3], [4, 0, 0]], np.int32)
    every = apply(variables, batch)
    some = apply(variables, batch | {"masked_positions": chosen})
    expected = np.take_along_axis(np.asarray(every["targets"]), chosen[..., None], 1)
    np.testing.assert_allclose(some["targets"], expected, **CLOSE)
    np.testing.assert_allclose(some["label"], every["label"], **CLOSE)


def test_too_long_a_row_is_refused_with_its_offset():
    config = EncoderConfig(trunk(**{**LEARNED, "max_len": 7}), VOCAB, position_offset=2)
    with pytest.raises(ValueError, match="6 tokens exceeds 5, model.trunk.max_len"):
        jax.eval_shape(models.build(config).init, jax.random.key(0), batch_of(config))


# --- What configs say of their models ---


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_limits_are_those_of_the_module(name):
    config = FAMILIES[name]
    batch, sizes = batch_of(config), config.sizes()
    assert batch.keys() >= config.reads().keys()
    model = models.build(config)
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
    assert out.keys() == config.outputs().keys()
    for key, size in config.outputs().items():
        if size:
            assert out[key].shape[-1] == sizes[size]
    if not config.wraps():
        assert config.generates() == hasattr(model, "extend")


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("embedding/embedding", 0),
        ("target_embedding/embedding", 0),
        ("encoder_positions/table/embedding", 0),
        ("head/kernel", 1),
        ("masked_bias", 0),
    ],
)
@pytest.mark.parametrize("size", [3, 7])
def test_shared_entries_of_a_vocabulary_are_kept(name, axis, size):
    config = FAMILIES["marian"]
    shape = (5,) if name == "masked_bias" else (5, 2) if axis == 0 else (2, 5)
    saved = numbered(*shape)
    fresh = -np.ones([size if x == 5 else x for x in shape], np.float32)
    values, how = config.adapt(name, saved, fresh)
    saved, fresh, values = (np.moveaxis(x, axis, 0) for x in (saved, fresh, values))
    kept = min(5, size)
    np.testing.assert_array_equal(values[:kept], saved[:kept])
    np.testing.assert_array_equal(values[kept:], fresh[kept:])
    assert f"{kept} of 5" in how and (f"{size - 5} new" in how) == (size > 5)


def test_positions_of_longer_rows():
    table, saved = "positions/table/embedding", numbered(5, 2)
    fresh = -np.ones((9, 2), np.float32)
    values, _ = FAMILIES["gpt2"].adapt(table, saved, fresh)
    np.testing.assert_array_equal(values, [*saved, *fresh[5:]])
    # Beltagy et al. 2020, 5: after RoBERTa's two rows that are no positions.
    values, how = FAMILIES["roberta"].adapt(table, saved, fresh)
    np.testing.assert_array_equal(values, saved[[0, 1, 2, 3, 4, 2, 3, 4, 2]])
    assert "repeated to 7" in how
    values, how = FAMILIES["vit"].adapt(table, numbered(5, 2), np.zeros((10, 2)))
    assert values.shape == (10, 2) and "interpolated" in how
    adapted = FAMILIES["lora"].adapt(table, saved, fresh)
    np.testing.assert_array_equal(adapted[0], [*saved, *fresh[5:]])


@pytest.mark.parametrize(
    ("name", "saved", "fresh"),
    [
        ("embedding/embedding", (5, 2), (6, 3)),
        ("label_head/kernel", (2, 5), (2, 6)),
        ("decoder/layer_0/feed_forward/up/kernel", (2, 5), (2, 6)),
    ],
)
def test_other_shapes_have_no_meaning(name, saved, fresh):
    for config in FAMILIES["gpt2"], FAMILIES["bert"], FAMILIES["vit"]:
        assert config.adapt(name, numbered(*saved), numbered(*fresh)) is None
