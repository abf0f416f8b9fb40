"""The papers' formulas and names: positions, patches, initialisers, parameters."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, LENGTH, T5, VISIONS, applied, batch_of, lm, trunk
from laws import CLOSE, flat, init

from triform import models
from triform.models import (
    EncoderDecoderConfig,
)
from triform.models.config import ROPE_SCALINGS, RopeConfig
from triform.models.heads import mean
from triform.models.mask import Mask
from triform.models.positions import (
    RELATIVE_BUCKETS,
    RELATIVE_MAX_DISTANCE,
    relative_bucket,
    rotary_frequencies,
    rotate,
    rotation,
)
from triform.models.transformer import Stack
from triform.models.vision import resized_positions
from triform.runtime.parameters import ROWS, axes_of
from triform.runtime.partition import AXES

# --- Formulas ---


def test_the_mean_leaves_padding_out():
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    segments = np.array([[1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(mean(jnp.asarray(x), segments), [[1, 2], [0, 0]])
    np.testing.assert_array_equal(mean(jnp.asarray(x), None), [[2, 3], [8, 9]])


def test_rotation_turns_pairs_by_the_angle_of_their_position():
    config = trunk(positions="rotary", head_dim=6)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 2, 6)).astype(np.float32)
    where = np.array([[0, 1, 5, 9]])
    got = rotate(jnp.asarray(x), rotation(config, jnp.asarray(where)))
    for p, position in enumerate(where[0]):
        for i in range(3):  # Su et al. 2021, eq. 15: theta_i = base ** (-2 i / E)
            angle = position * config.rope.base ** (-2 * i / 6)
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


def test_linear_scaling_divides_positions():
    plain = rotary_frequencies(trunk(positions="rotary"))[0]
    rope = RopeConfig(scaling="linear", factor=4.0)
    found = rotary_frequencies(trunk(positions="rotary", rope=rope))[0]
    np.testing.assert_allclose(found * 4, plain)


READ = [(kind, name) for kind, names in ROPE_SCALINGS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), READ)
def test_every_number_of_a_scaling_changes_the_frequencies(kind, name):
    numbers = {"factor": 3.0, "length": 512 if "length" in ROPE_SCALINGS[kind] else 0}
    rope = RopeConfig(scaling=kind, **numbers)
    other = dataclasses.replace(rope, **{name: 1.5 * getattr(rope, name) or 0.7})
    rope.validate("rope")
    other.validate("rope")
    sizes = {"positions": "rotary", "head_dim": 64}
    (x, a), (y, b) = (rotary_frequencies(trunk(**sizes, rope=r)) for r in (rope, other))
    assert a != b or not np.array_equal(x, y)


def test_llama3_scaling_is_the_published_one():
    factor, low, high, length = 8.0, 1.0, 4.0, 8192
    fields = {"positions": "rotary", "head_dim": 64}
    plain = rotary_frequencies(trunk(**fields, rope=RopeConfig(500_000.0)))[0]
    rope = RopeConfig(500_000.0, "llama3", factor, length, low=low, high=high)
    found, size = rotary_frequencies(trunk(**fields, rope=rope))
    assert size == 1.0
    met = set()
    for rate, got in zip(plain, found, strict=True):
        wavelength = 2 * math.pi / rate
        if wavelength < length / high:
            kind, expected = "kept", rate
        elif wavelength > length / low:
            kind, expected = "divided", rate / factor
        else:
            smooth = (length / wavelength - low) / (high - low)
            kind, expected = "mixed", (1 - smooth) * rate / factor + smooth * rate
        met.add(kind)
        assert got == pytest.approx(expected, rel=1e-12)
    assert met == {"kept", "divided", "mixed"}


@pytest.mark.parametrize("attention", [0.0, 1.5])
def test_yarn_divides_what_turns_slowly_and_keeps_what_turns_fast(attention):
    factor, fast, slow, length = 16.0, 32.0, 1.0, 4096
    fields = {"positions": "rotary", "head_dim": 128}
    plain = rotary_frequencies(trunk(**fields))[0]
    numbers = {"fast": fast, "slow": slow, "attention": attention}
    rope = RopeConfig(scaling="yarn", factor=factor, length=length, **numbers)
    found, size = rotary_frequencies(trunk(**fields, rope=rope))
    # Peng et al. 2023, eq. 22, unless it is given.
    assert size == (attention or pytest.approx(0.1 * math.log(factor) + 1))
    kept = (factor * found / plain - 1) / (factor - 1)
    turns = length * plain / (2 * math.pi)
    np.testing.assert_allclose(kept[turns >= fast], 1, atol=1e-9)
    np.testing.assert_allclose(kept[turns <= slow], 0, atol=1e-9)
    between = kept[(turns < fast) & (turns > slow)]
    assert len(between) > 10
    assert ((between >= 0) & (between < 1)).all()
    np.testing.assert_allclose(np.diff(between), between[1] - between[0], atol=1e-9)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "yarn, scanned", "relative, windows"]
)
def test_only_distances_matter(name):
    config = FAMILIES[name]
    batch, where = batch_of(config), np.arange(LENGTH, dtype=np.int32)[None]
    apply, variables = applied(config), {"params": init(config, batch)}
    here, there = (
        apply(variables, batch | {"positions": where + shift})["targets"]
        for shift in (0, 50)
    )
    # Angles of 50 radians have errors of 4e-6 in float32.
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-4)
    apart = apply(variables, batch | {"positions": 2 * where})["targets"]
    assert np.abs(apart - here).max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
def test_the_bias_is_the_tables_entry_of_head_and_bucket(causal):
    """Causal stacks spend all buckets on the past (Raffel et al. 2020, 2.1)."""
    config, length = (
        trunk(**{**T5, "max_len": 40}),
        40,
    )  # beyond the buckets of one distance
    where = jnp.arange(length)[None]
    stack, mask = Stack(config), Mask.self_attention(where, causal=causal)
    x = jnp.zeros((1, length, config.d_model))
    params = stack.init(jax.random.key(0), x, mask)["params"]
    _, seen = stack.apply(
        {"params": params},
        x,
        mask,
        mutable="intermediates",
        capture_intermediates=lambda module, _: module.name == "relative_bias",
    )
    (bias,) = seen["intermediates"]["relative_bias"]["__call__"]
    distance = where[0][None] - where[0][:, None]  # of key from query
    bucket = np.asarray(relative_bucket(distance, bidirectional=not causal))
    table = np.asarray(params["relative_bias"]["embedding"])
    np.testing.assert_array_equal(bias[0], table[bucket].transpose(2, 0, 1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_grow_exactly_logarithmically(bidirectional):
    """The t5x formula in whole numbers, where no logarithm is rounded."""
    buckets = RELATIVE_BUCKETS // (2 if bidirectional else 1)
    exact, grown = buckets // 2, buckets - buckets // 2
    distance = np.arange(2 * RELATIVE_MAX_DISTANCE)
    found = relative_bucket(jnp.asarray(-distance), bidirectional)
    for d, got in zip(distance.tolist(), found.tolist(), strict=True):
        # The last m with exact * (max / exact) ** (m / grown) <= d.
        steps = [
            m
            for m in range(grown)
            if exact**grown * RELATIVE_MAX_DISTANCE**m <= d**grown * exact**m
        ]
        assert got == (d if d < exact else exact + steps[-1]), d


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


@pytest.mark.parametrize("name", VISIONS)
def test_images_become_patches_and_the_pool_is_classified(name):
    config = FAMILIES[name]
    model, batch = models.build(config), batch_of(config)
    params = init(config, batch)
    seen = {"patches", "positions", "encoder"}

    @jax.jit
    def run(params):
        return model.apply(
            {"params": params},
            batch,
            mutable="intermediates",
            capture_intermediates=lambda module, _: module.name in seen,
        )

    out, state = run(params)
    seen = {k: x["__call__"][0] for k, x in state["intermediates"].items()}
    rows, patch = len(batch["image"]), config.patch_size
    grid = config.image_size // patch
    image = batch["image"].reshape(rows, grid, patch, grid, patch, config.channels)
    flat_patches = image.transpose(0, 1, 3, 2, 4, 5).reshape(rows, grid**2, -1)
    # Dosovitskiy et al. 2021, eq. 1.
    kernel = params["patches"]["kernel"].reshape(-1, config.trunk.d_model)
    x = flat_patches @ kernel + params["patches"]["bias"]
    np.testing.assert_allclose(seen["patches"].reshape(x.shape), x, **CLOSE)
    if config.pool == "token":
        token = np.broadcast_to(params["token"], (rows, 1, x.shape[-1]))
        x = np.concatenate([token, x], 1)
    x += params["positions"]["table"]["embedding"]
    np.testing.assert_allclose(seen["positions"], x, **CLOSE)
    last = np.asarray(seen["encoder"][0])
    pooled = last[:, 0] if config.pool == "token" else last.mean(1)
    head = params["label_head"]
    expected = pooled @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(out["label"], expected, **CLOSE)


def test_positions_of_another_resolution():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((17, 3)).astype(np.float32)
    np.testing.assert_allclose(resized_positions(table, 17), table, atol=1e-6)
    np.testing.assert_array_equal(resized_positions(table, 37)[0], table[0])
    assert resized_positions(table, 36).shape == (36, 3)  # without the class token
    with pytest.raises(ValueError, match="18 positions are no square grid"):
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


# --- Names ---


def both(*modules, kinds=("kernel", "bias")):
    return {f"{module}/{kind}" for module in modules for kind in kinds}


def norms(*modules):
    return both(*modules, kinds=("scale", "bias"))


TABLE, LEARNED_TABLE = "embedding/embedding", "positions/table/embedding"
BERT = {
    TABLE,
    LEARNED_TABLE,
    "token_type_embedding/embedding",
    *norms("embedding_norm"),
}
MASKED = {*both("masked_head/dense"), *norms("masked_head/norm"), "masked_bias"}
T5_STACKS = {f"{s}/relative_bias/embedding" for s in ("encoder", "decoder")} | {
    f"{s}/norm/scale" for s in ("encoder", "decoder")
}
# All parameters but those of layers.
NAMES = {
    "gpt2": {TABLE, LEARNED_TABLE, *norms("decoder/norm")},
    "llama": {TABLE, "head/kernel", "decoder/norm/scale"},
    "qwen2": {TABLE, "decoder/norm/scale"},
    "yarn, scanned": {TABLE, "decoder/norm/scale"},
    "t5": {TABLE, *T5_STACKS},
    "t5 v1.1": {TABLE, "head/kernel", *T5_STACKS},
    "marian": {TABLE, "head_bias"},
    "bert": {*BERT, *MASKED, *both("pooler", "label_head")},
    "roberta": {*BERT, *MASKED},
    "classifier": {
        *(TABLE, LEARNED_TABLE, "token_type_embedding/embedding"),
        *(norms("encoder/norm") | both("pooler", "label_head")),
    },
    "tagger": {*BERT, *both("tag_head")},
    "vit": {
        *("token", LEARNED_TABLE),
        *(both("patches", "label_head") | norms("encoder/norm")),
    },
    "vit, mean": {
        LEARNED_TABLE,
        *(both("patches", "label_head") | norms("encoder/norm")),
    },
}


def shapes(name) -> dict:
    """{path: shape and dtype} of a family's parameters."""
    config = FAMILIES[name]
    model = models.build(config)
    return jax.eval_shape(model.init, jax.random.key(0), batch_of(config))["params"]


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names_are_stable(layer_names, name):
    """Checkpoints, decay, partition rules and weight exchange match on them."""
    config, found = FAMILIES[name], set(flat(shapes(name)))
    trunk, expected = config.trunk, set(NAMES[name])
    for stack in {x.split("/")[0] for x in found} & {"encoder", "decoder"}:
        attentions = ["self_attention"]
        if stack == "decoder" and isinstance(config, EncoderDecoderConfig):
            attentions.append("cross_attention")
        repeated = range(trunk.num_layers)
        layers = (
            ["layers/layer_0"]
            if trunk.scan_layers
            else map("layer_{}".format, repeated)
        )
        for layer in layers:
            expected |= layer_names(trunk, attentions, f"{stack}/{layer}/")
    assert found == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_axes_knows_every_parameter(name):
    rows = (*FAMILIES[name].PARAMETERS, *ROWS)
    inputs = {"out": 2, "patches": 3}  # input axes of a kernel, else one
    hidden = r"(query|key|value|out|up|gate|down|pooler|dense|patches|frame)/kernel$"
    mesh = dict(zip(AXES, (1, 2, 2, 1), strict=True))
    for path, x in flat(shapes(name)).items():
        axes = axes_of(path, x.shape, rows)
        small = path.endswith(("bias", "scale"))
        assert axes.decays == (not small), path
        spec = axes.spec(x.shape, mesh)
        assert len(spec) == x.ndim
        assert not (small and "fsdp" in spec)
        matrix = axes.matrix()
        if "lora_" not in path and FAMILIES[name].trunks():
            assert (matrix is not None) == bool(re.search(hidden, path)), path
        if re.search(hidden, path):
            scanned = "/layers/" in f"/{path}"
            each = tuple(range(scanned, x.ndim))
            split = inputs.get(path.split("/")[-2], 1)
            assert matrix == (each[:split], each[split:]), path
