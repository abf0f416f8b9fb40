"""Performer: the estimator against float64, its statistics, its memory, the laws."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    FAMILIES,
    LENGTH,
    PERFORMER,
    applied,
    batch_of,
    lm,
    real_positions,
)
from hypothesis import given, settings
from laws import init

from triform.models import EncoderDecoderConfig
from triform.models.algorithms.features import EPSILON, projection
from triform.models.algorithms.performer import PerformerState, performer
from triform.models.cache import Cache
from triform.models.mask import Mask, Refused

BATCH, HEADS, GROUPS, WIDTH, FEATURES = 2, 4, 2, 4, 10
SCALE = WIDTH**-0.5
# Three chunks of 32, the last not full, and halves of halves within.
SLOTS, QUERIES, CHUNK = 69, 21, 32
# Sums of some 400 terms in float32, whose exponents are below 10.
CLOSE = 2e-5


def logs(x, w, kernel):
    """log phi(x) [..., M], its derivative by w x, and minus that by x given w x."""
    along = x @ w.T
    if kernel == "softmax":
        return along - (x * x).sum(-1, keepdims=True) / 2, np.ones_like(along), x
    positive = np.maximum(along, 0) + EPSILON
    return np.log(positive), (along > 0) / positive, 0 * x


def reference(q, k, v, allowed, out_grad, kernel="softmax"):
    """Output and gradients of (q, k, v) in float64, one head at a time."""
    w = np.float64(projection(FEATURES, WIDTH))
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h in np.ndindex(len(q), q.shape[2]):
        g = h * k.shape[2] // q.shape[2]
        x, y = q[b, :, h] * SCALE**0.5, k[b, :, g] * SCALE**0.5
        (a, da, ax), (c, dc, cx) = logs(x, w, kernel), logs(y, w, kernel)
        terms = a[:, None] + c  # [L, S, M]
        terms = np.where(allowed[b, :, :, None], terms, -np.inf)
        top = terms.max((1, 2), keepdims=True)
        terms = np.exp(terms - np.where(np.isfinite(top), top, 0))
        total = terms.sum((1, 2), keepdims=True)
        terms /= np.where(total > 0, total, 1)
        weights = terms.sum(-1)
        out[b, :, h] = weights @ v[b, :, g]
        dv[b, :, g] += weights.T @ out_grad[b, :, h]
        centred = v[b, :, g] - out[b, :, h, None]
        terms *= np.einsum("le,lse->ls", out_grad[b, :, h], centred)[..., None]
        of_q, of_k = terms.sum(1), terms.sum(0)
        dq[b, :, h] = ((of_q * da) @ w - of_q.sum(-1, keepdims=True) * ax) * SCALE**0.5
        dk[b, :, g] += ((of_k * dc) @ w - of_k.sum(-1, keepdims=True) * cx) * SCALE**0.5
    return out, dq, dk, dv


def arrays(queries, keys, dtype=np.float32, norm=None, seed=0):
    """q, k, v and a gradient of the output."""
    rng = np.random.default_rng(seed)
    heads = (queries, HEADS), (keys, GROUPS), (keys, GROUPS), (queries, HEADS)
    found = [rng.standard_normal((BATCH, *x, WIDTH)) for x in heads]
    if norm:
        for x in found[:2]:
            x *= norm / np.linalg.norm(x, axis=-1, keepdims=True)
    return [jnp.asarray(x, dtype) for x in found]


@functools.cache
def compiled(causal=False, aligned=False, **options):
    """(q, k, v, gradient of the output, positions and segments of queries and of keys)
    -> the output, and the gradients of q, k, v."""
    options = {"features": FEATURES, "chunk": CHUNK, "scale": SCALE, **options}

    @jax.jit
    def run(q, k, v, out_grad, *where):
        mask = Mask(*where, causal=causal, aligned=aligned)
        out, back = jax.vjp(lambda *x: performer(*x, mask, **options), q, k, v)
        return out, *back(out_grad)

    return run


def assert_is_reference(found, args, where, causal, close=CLOSE, **options):
    allowed = np.asarray(Mask(*where, causal=causal).allowed())
    allowed = np.broadcast_to(allowed, (BATCH, *allowed.shape[1:]))
    expected = reference(*args[:3], allowed, args[3], **options)
    for got, want in zip(found, expected, strict=False):
        atol = close * max(1, np.abs(want).max())
        np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=atol)
    assert not np.asarray(found[0])[~allowed.any(-1)].any()


# --- The estimator is what it says ---


@st.composite
def rows_in_order(draw):
    """(positions, segments) [B, SLOTS]: segments that do not fall, empty slots."""
    segments = np.zeros((BATCH, SLOTS), np.int32)
    positions = np.full((BATCH, SLOTS), -1, np.int32)
    for b in range(BATCH):
        cuts = draw(st.lists(st.integers(0, SLOTS), max_size=4))
        number = np.searchsorted(np.sort(cuts), np.arange(SLOTS), side="right") + 1
        empty = draw(st.lists(st.integers(0, SLOTS - 1), max_size=12))
        number[empty] = 0
        segments[b] = number
        at = draw(st.integers(0, 3))
        for s in np.unique(number[number > 0]):
            here = np.flatnonzero(number == s)
            positions[b, here] = at + 2 * np.arange(len(here))
    # What is empty is so by its position, by its segment, or by both.
    by_position = draw(st.booleans())
    if by_position:
        segments[segments == 0] = 1
    return positions, segments


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows_in_order(), st.integers(0, 99))
def test_causal_attention_equals_float64(rows, seed):
    args = arrays(SLOTS, SLOTS, seed=seed)
    where = *(rows[0],) * 2, *(rows[1],) * 2
    found = compiled(causal=True)(*args, *where)
    assert_is_reference(found, args, where, True)


def slots(count):
    return st.lists(st.integers(0, 3), min_size=BATCH * count, max_size=BATCH * count)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(slots(QUERIES), slots(SLOTS), st.booleans(), st.integers(0, 99))
def test_bidirectional_attention_equals_float64(q, k, padded, seed):
    """Any segments in any order; `padded`: one segment in each row, and padding."""
    q, k = (np.array(x, np.int32).reshape(BATCH, -1) for x in (q, k))
    if padded:
        q, k = np.minimum(q, 1), np.where(k > 1, 1, 0)
    args = arrays(QUERIES, SLOTS, seed=seed)
    # A query's or key's position may say that nothing is there, too.
    where = np.where(q == 3, -1, q), np.where(k == 3, -1, k), q, k
    found = compiled(chunk=16)(*args, *where)
    assert_is_reference(found, args, where, False)


CASES = (  # kernel, causal, chunk
    ("relu", True, 8),
    ("softmax", True, 1),
    ("softmax", False, 128),
)


@pytest.mark.parametrize(("kernel", "causal", "chunk"), CASES)
def test_one_sequence_equals_float64(kernel, causal, chunk):
    args = arrays(SLOTS, SLOTS)
    where = (np.arange(SLOTS, dtype=np.int32)[None],) * 2
    run = compiled(causal=causal, aligned=True, kernel=kernel, chunk=chunk)
    # The gradient of a ReLU's logarithm is up to 1 / EPSILON.
    close = CLOSE if kernel == "softmax" else 10 * CLOSE
    found = run(*args, *where)
    assert_is_reference(found, args, where, causal, close, kernel=kernel)


def whole_rows(queries=SLOTS, keys=SLOTS):
    """Positions and segments of rows that are one sequence each."""
    counts = queries, keys
    return [
        *(np.arange(n, dtype=np.int32)[None].repeat(BATCH, 0) for n in counts),
        *(np.ones((BATCH, n), np.int32) for n in counts),
    ]


@pytest.mark.parametrize(("queries", "causal"), [(SLOTS, True), (QUERIES, False)])
def test_any_norm(queries, causal):
    """Norms of 50 (scores of 1,250): no overflow, and nothing is lost."""
    args, where = arrays(queries, SLOTS, norm=50), whole_rows(queries)
    run = compiled(causal=True) if causal else compiled(chunk=16)
    found = run(*args, *where)
    # Logarithms of some 1,000 are off by 2^-14 = 6e-5 each, and four are added.
    assert_is_reference(found, args, where, causal, 1e-3)


def test_any_norm_in_bfloat16():
    args, where = arrays(SLOTS, SLOTS, jnp.bfloat16, norm=50), whole_rows()
    mask = Mask(*where, causal=True)
    options = {"features": FEATURES, "chunk": 8, "scale": SCALE}
    out = jax.jit(lambda *x: performer(*x, mask, **options))(*args[:3])
    assert out.dtype == jnp.bfloat16
    # The same inside; what is returned is rounded to 8 bits.
    assert_is_reference([out], args, where, True, 2**-8)


def test_the_future_cannot_erase_the_past():
    """Not even where its features are e^400 times those of all before it."""
    q, k, v, grad = arrays(SLOTS, SLOTS, norm=50)
    run = compiled(causal=True)
    expected = run(q, k, v, grad, *whole_rows())[0]
    for t in (1, 7, 8, 15, 16, 30, 32, 60):
        near = k.at[:, t].multiply(1 / 50)
        out = run(q, near, v, grad, *whole_rows())[0]
        np.testing.assert_array_equal(out[:, :t], expected[:, :t])
        assert (out[:, t] != expected[:, t]).any()


def test_rows_out_of_order_are_not_numbers():
    run, args = compiled(causal=True), arrays(SLOTS, SLOTS)
    for fields, place, value in (
        ((0, 1), 3, 5),  # positions fall
        ((0, 1), 3, 2),  # positions stay
        ((2, 3), 0, 2),  # segments fall
        ((1,), 68, 70),  # keys are elsewhere than queries
        ((3,), 68, 2),
    ):
        where = whole_rows()
        for i in fields:
            where[i][1, place] = value
        out = run(*args, *where)[0]
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


# --- Options and refusals ---


def test_features_are_drawn_anew_in_training_only():
    q, k, v, _ = arrays(8, 8)
    mask = Mask.self_attention(jnp.arange(8)[None])

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, redraw):
        options = {"features": FEATURES, "redraw": redraw, "dropout": 0.0}
        return performer(q, k, v, mask, scale=SCALE, rng=key, **options)

    first, second = jax.random.split(jax.random.key(0))
    fixed = run(None, True)
    np.testing.assert_array_equal(run(first, True), run(first, True))
    assert (run(first, True) != run(second, True)).any()
    assert (run(first, True) != fixed).any()
    np.testing.assert_allclose(run(first, False), fixed, atol=1e-6)


def test_every_option_changes_the_program():
    q, k, v, _ = arrays(8, 8)
    mask = Mask.self_attention(jnp.arange(8)[None])

    def program(**options):
        closed = jax.make_jaxpr(
            lambda rng: performer(q, k, v, mask, scale=SCALE, rng=rng, **options)
        )(jax.random.key(0))
        return str(closed) + str([np.asarray(x).tobytes() for x in closed.consts])

    fixed = {"redraw": False}
    assert program() == program()
    assert program(**fixed) != program()
    for change in (
        *({"features": 8}, {"kernel": "relu"}, {"chunk": 4}),
        *({"seed": 1}, {"orthogonal": False}),
    ):
        assert program(**fixed, **change) != program(**fixed), change


def even(i, j):
    return (i - j) % 2 == 0


SEEN = jnp.zeros((1, 8), bool)
REFUSED = {  # words of the message: fields of the mask, arguments
    r"a bias of shape \(1, 4, 8, 8\).*positions": (
        {},
        {"bias": jnp.ones((1, 4, 8, 8))},
    ),
    r"a window of 3.*set model.trunk.windows=\(\)": ({"window": 3}, {}),
    "dilation 2.*local": ({"dilation": 2}, {}),
    "a mask with pattern.*flash": ({"pattern": even}, {}),
    "a mask with q_global": ({"q_global": SEEN}, {}),
    "a mask with kv_global": ({"kv_global": SEEN}, {}),
    "attention_dropout=0.1.*set model.trunk.attention_dropout=0": (
        {},
        {"dropout": 0.1, "rng": jax.random.key(0)},
    ),
    "features=0: must be a whole number": ({}, {"features": 0}),
    "features=2.5: must be": ({}, {"features": 2.5}),
    "kernel='cos': expected one of softmax, relu": ({}, {"kernel": "cos"}),
    "redraw='yes': must be True or False": ({}, {"redraw": "yes"}),
    "orthogonal=1: must be True or False": ({}, {"orthogonal": 1}),
    "seed=-1: must be": ({}, {"seed": -1}),
    "chunk=48: must be a power of two": ({}, {"chunk": 48}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_do_is_refused(message):
    fields, options = REFUSED[message]
    q, k, v, _ = arrays(8, 8)
    mask = Mask.self_attention(jnp.arange(8)[None], **fields)
    with pytest.raises(Refused, match=rf"model\.trunk\.attention.*{message}"):
        performer(q, k, v, mask, scale=SCALE, **options)
    if "mask with" not in message:
        new = {"features": FEATURES, **options}
        with pytest.raises(Refused, match=message):
            state = PerformerState.empty(
                (BATCH, 8, GROUPS, WIDTH),
                "float32",
                **{k: x for k, x in new.items() if k not in ("bias", "rng", "dropout")},
            )
            state.attend(performer, q, k, v, mask, 0, scale=SCALE, **new)


def test_causal_attention_to_something_else_is_refused():
    q, k, v, _ = arrays(8, 9)
    mask = Mask(jnp.arange(8)[None], jnp.arange(9)[None], causal=True)
    with pytest.raises(Refused, match="8 queries to 9 keys.*PerformerState"):
        performer(q, k, v, mask, scale=SCALE)


def test_dropout_without_an_rng_is_nothing():
    q, k, v, _ = arrays(8, 8)
    mask = Mask.self_attention(jnp.arange(8)[None])
    jax.eval_shape(lambda: performer(q, k, v, mask, scale=SCALE, dropout=0.1))


# --- Memory ---


@pytest.mark.parametrize(
    ("causal", "backward"), [(True, False), (True, True), (False, False)]
)
def test_memory_grows_with_the_length_alone(causal, backward):
    def needed(length):
        def run(q, k, v, segments):
            positions = jnp.arange(length)[None]
            mask = Mask.self_attention(positions, segments, causal=causal)
            options = {"features": FEATURES, "chunk": 8}
            return performer(q, k, v, mask, scale=SCALE, **options).sum()

        args = [
            jax.ShapeDtypeStruct((1, length, heads, WIDTH), jnp.float32)
            for heads in (HEADS, GROUPS, GROUPS)
        ]
        args.append(jax.ShapeDtypeStruct((1, length), jnp.int32))
        fn = jax.grad(run, (0, 1, 2)) if backward else run
        analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    short, long = needed(512), needed(2048)
    assert long < 4.1 * short
    assert long < 4 * 2048**2  # float32 weights of one head


# --- Models: law 4; law 3 is in test_families.py ---

# Exponents of features are up to 20 or so: 1e-6 each.
NEAR = {"rtol": 1e-4, "atol": 5e-5}


@pytest.mark.parametrize("scanned", [False, True])
def test_decoding_carries_no_more_for_longer_texts(scanned):
    config = lm(**PERFORMER, scan_layers=scanned).trunk
    sizes = [
        [x.shape for x in jax.tree.leaves(Cache.empty(config, 3, n).blocks)]
        for n in (8, 8000)
    ]
    assert sizes[0] == sizes[1]
    # Beam search exchanges rows along this axis.
    assert {shape[int(scanned)] for shape in sizes[0]} == {3}


@pytest.mark.parametrize("name", ["performer", "performer pairs"])
def test_packed_equals_separate(packed, name):
    """In a batch of rows of one sequence each and a row of all of them."""
    config, lengths, sources = FAMILIES[name], (3, 2, 5), ()
    batch = batch_of(config)
    batch["segments"] = real_positions(*lengths)
    batch["positions"] = np.arange(LENGTH, dtype=np.int32)[None].repeat(3, 0)
    if isinstance(config, EncoderDecoderConfig):
        sources = (4, 6, 1)
        batch["encoder_segments"] = real_positions(*sources)
        batch["encoder_positions"] = batch["positions"]
    row = packed(batch, lengths, sources)
    both = {
        k: np.concatenate([np.pad(batch[k], ((0, 0), (0, x.shape[1] - LENGTH))), x])
        for k, x in row.items()
    }
    logits = applied(config)({"params": init(config, batch)}, both)["targets"]
    expected = np.concatenate([logits[r, :n] for r, n in enumerate(lengths)])
    np.testing.assert_allclose(logits[3, : sum(lengths)], expected, **NEAR)
    assert np.isfinite(logits).all()
