"""Attention over a text and a grid of codes after it (Ramesh et al. 2021, B.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, batch_of, with_trunk
from laws import assert_trees_close, init, value_and_grad

from triform import models
from triform.configs import dalle
from triform.models.algorithms import ALGORITHMS
from triform.models.algorithms.blocks import visible_blocks
from triform.models.mask import Mask
from triform.models.patterns import is_pattern, on_grid, pattern_of
from triform.models.stacking import looped_layers, stacked_layers

CONFIG = FAMILIES["dalle"]
TEXT, SIDE = CONFIG.text_len, CONFIG.grid
NEAR = {"rtol": 2e-5, "atol": 1e-5}


def positions(length):
    return jnp.arange(length, dtype=jnp.int32)[None]


def seen(kind, text, side, kernel=3):
    """bool [L, L] by the definition, cell by cell."""
    length = text + side**2
    found = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(i + 1):
            if j < text:
                found[i, j] = True
                continue
            if i < text:
                continue
            # Rows and columns of both; what runs on beyond an edge is the next row.
            distance = i - j
            offsets = {
                "row": set(range(side + 1)),
                "column": {side * n for n in range(side)},
                "conv": {
                    side * down + right
                    for down in range(kernel // 2 + 1)
                    for right in range(-(kernel // 2), kernel // 2 + 1)
                },
            }[kind]
            found[i, j] = distance in offsets
    return found


@pytest.mark.parametrize(("text", "side"), [(6, 4), (1, 7), (3, 3)])
@pytest.mark.parametrize("pattern", ["row", "column", "conv:3", "conv:5"])
def test_patterns_are_those_of_the_paper(pattern, text, side):
    kind, _, kernel = pattern.partition(":")
    name = on_grid(pattern, text, side)
    where = positions(text + side**2)
    mask = Mask.self_attention(where, causal=True, pattern=pattern_of(name))
    wanted = seen(kind, text, side, int(kernel or 3))
    np.testing.assert_array_equal(mask.allowed()[0], wanted)
    assert on_grid(name, 9, 9) == name
    assert is_pattern(name) and not is_pattern(pattern)


def test_figure_11():
    """Six positions of text, a grid of 4 x 4; the queries of its last code."""
    last = {k: seen(k, 6, 4)[-1, 6:].reshape(4, 4) for k in ("row", "column", "conv")}
    # Back to the position above.
    assert np.flatnonzero(last["row"]).tolist() == [11, 12, 13, 14, 15]
    assert np.flatnonzero(last["column"]).tolist() == [3, 7, 11, 15]
    # Right of the last column is the next row: 12 is above and to the right of 15.
    assert np.flatnonzero(last["conv"]).tolist() == [10, 11, 12, 14, 15]


@pytest.mark.parametrize("pattern", ["row", "column", "conv:5"])
def test_flash_agrees_with_the_dense_mask_and_skips_blocks(pattern):
    text, side, block = 16, 12, 16
    length = text + side**2
    name = on_grid(pattern, text, side)
    mask = Mask.self_attention(
        positions(length), causal=True, pattern=pattern_of(name), aligned=True
    )
    rng = np.random.default_rng(0)
    q, k, v, up = (
        rng.standard_normal((1, length, 2, 4)).astype(np.float32) for _ in range(4)
    )

    @jax.jit
    def run(q, k, v):
        found = {}
        for algorithm, options in (("dot", {}), ("flash", {"block": block})):

            def total(q, k, v, algorithm=algorithm, options=options):
                attend = ALGORITHMS[algorithm]
                out = attend(q, k, v, mask, scale=0.5, **options)
                return (out * up).sum(), out

            found[algorithm] = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return found, visible_blocks(mask, block, block)[1]

    found, count = run(q, k, v)
    assert_trees_close(found["flash"], found["dot"])
    # A column reaches into every block of 16 positions, the others do not.
    causal = np.arange(1, len(count) + 1)
    assert (np.asarray(count) <= causal).all()
    if pattern != "column":
        assert count.sum() < 0.75 * causal.sum()


def test_cached_decoding_equals_the_full_pass():
    """Law 3, with all three patterns and texts of every length, from any code on."""
    batch = batch_of(CONFIG)
    batch["text_segments"] = (np.arange(TEXT) < np.array([[6], [3], [1]])) * 1
    batch["text_segments"] = batch["text_segments"].astype(np.int32)
    model, params = models.build(CONFIG), init(CONFIG, batch)

    @jax.jit
    def run(params):
        def call(*args, **options):
            return model.apply({"params": params}, *args, **options)

        found = []
        for kept, sizes in ((0, (1,) * SIDE**2), (4, (2, 3))):
            cache, first, at = call(batch, kept, method="start")
            rest = jnp.concatenate([first[:, None], batch["codes"][:, kept:]], 1)
            logits, start = [], 0
            for size in sizes:
                where = at[:, None] + start + jnp.arange(size)
                piece = rest[:, start : start + size]
                out, cache = call(piece, where, cache, method="extend")
                logits.append(out)
                start += size
            found.append(jnp.concatenate(logits, 1))
        return call(batch)["codes"], found

    full, (single, pieces) = run(params)
    np.testing.assert_allclose(single, full, **NEAR)
    np.testing.assert_allclose(pieces, full[:, 4:], **NEAR)


def test_the_future_cannot_change_the_past_and_fillers_are_no_text():
    """Law 4; where there is no text, its ids mean nothing."""
    text, codes = TEXT, SIDE**2
    batch = batch_of(CONFIG, rows=1)
    batch = {k: np.repeat(x, text + codes + 2, 0) for k, x in batch.items()}
    batch["text_segments"][:, text - 1] = 0
    for t in range(text):
        batch["text"][t, t:] = 1
    for t in range(codes):
        batch["codes"][text + t, t:] += 1
        batch["codes"] %= CONFIG.num_codes
    batch["text"][-2, text - 1] += 1  # no text
    params = init(CONFIG, batch)
    out = jax.jit(models.build(CONFIG).apply)({"params": params}, batch)
    logits = np.concatenate(
        [out["text"] @ np.ones((11, 13)) / 11, out["codes"]], 1
    )  # [rows, text - 1 + codes, 13]
    for t in range(1, text + codes):
        np.testing.assert_allclose(logits[t, :t], logits[-1, :t], rtol=0, atol=1e-5)
        if t != text - 1 and t < text + codes - 1:
            assert np.abs(logits[t, t] - logits[-1, t]).max() > 1e-5, t
    np.testing.assert_allclose(logits[-2], logits[-1], rtol=0, atol=1e-6)


def test_scan_equals_loop_and_remat_equals_not():
    """Law 4."""
    batch = batch_of(CONFIG)
    params = init(CONFIG, batch)
    expected, grads = value_and_grad(CONFIG, params, batch)
    other = with_trunk(CONFIG, scan_layers=True, remat=True)
    scanned = stacked_layers(params, CONFIG.trunk.cycle())
    got, found = value_and_grad(other, scanned, batch)
    assert_trees_close(got, expected)
    assert_trees_close(looped_layers(found), grads)


def test_the_published_shape():
    """12 billion parameters: 64 layers, 62 heads of 64, 256 and 1,024 positions."""
    config = dalle.get_config("12b").resolved()
    trunk = config.model.trunk
    assert (config.model.text_len, config.model.grid) == (256, 32)
    assert trunk.max_len == 1280 and trunk.d_model == 62 * 64 == 3968
    kinds = [trunk.limits_of(i)[1] for i in range(64)]
    assert kinds[:4] == ["row:256:32", "column:256:32", "row:256:32", "row:256:32"]
    assert kinds[-1] == "conv:11:256:32" and kinds[:-1] == (kinds[:4] * 16)[:-1]
    batch = {
        name: jax.ShapeDtypeStruct(
            [{"B": 1, **config.model.axes()}[axis] for axis in axes], dtype
        )
        for name, (axes, dtype) in config.model.reads().items()
    }
    model = models.build(config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    width, layers = 3968, 64
    ids = 16_384 + 256 + 8192
    table = (ids + 256 + 32 + 32) * width
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width
    heads = (16_384 + 8192) * width
    total = table + layers * block + 2 * width + heads
    assert sum(x.size for x in jax.tree.leaves(shapes)) == total == 12_292_808_448
