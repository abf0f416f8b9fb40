"""Law 2: flash and local against float64, and which way flash goes."""

import contextvars
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import attention_reference

from triform.models.algorithms.blocks import block_size, pad_mask, visible_blocks
from triform.models.algorithms.blockwise import blockwise, planned
from triform.models.algorithms.dot import dot
from triform.models.algorithms.flash import choose, flash, told
from triform.models.algorithms.local import local
from triform.models.mask import Mask, Refused

BATCH, WIDTH = 2, 8
SCALE = WIDTH**-0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that a case of attention is made of."""

    queries: int
    keys: int
    heads: int
    groups: int
    bias_rows: int = 0
    causal: bool = False
    window: int = 0
    dilation: int = 1
    segments: bool = False
    globals: bool = False
    pattern: bool = False
    shuffled: bool = False
    aligned: bool = False
    block: int = 8
    dtype: str = "float32"
    seed: int = 0

    def mask(self) -> Mask:
        """Ragged rows: empty slots, packed segments, positions in any order."""
        rng = np.random.default_rng(self.seed)

        def side(length: int):
            where = np.arange(length)
            if not self.aligned:
                where += self.keys - length
            where = np.broadcast_to(where, (BATCH, length)).astype(np.int32)
            if self.shuffled and not self.aligned:  # and some slots are empty
                where = rng.permuted(where, axis=1)
                where[rng.random(where.shape) < 0.2] = -1
            segments = np.sort(rng.integers(0, 4, where.shape), 1)[:, ::-1]
            flags = rng.random(where.shape) < 0.1
            return where, segments.astype(np.int32), flags

        q, kv = side(self.queries), side(self.keys)
        return Mask(
            q[0],
            kv[0],
            q[1] if self.segments else None,
            kv[1] if self.segments else None,
            q[2] if self.globals else None,
            kv[2] if self.globals else None,
            causal=self.causal,
            window=self.window,
            dilation=self.dilation,
            pattern=(lambda i, j: (i // 5) % 3 == j % 3) if self.pattern else None,
            aligned=self.aligned,
        )

    def arrays(self):
        """q, k, v, bias (or None) and the gradient of the output."""
        rng = np.random.default_rng(self.seed + 1)
        q, grad = rng.standard_normal((2, BATCH, self.queries, self.heads, WIDTH))
        k, v = rng.standard_normal((2, BATCH, self.keys, self.groups, WIDTH))
        bias = None
        if self.bias_rows:
            shape = (self.bias_rows, self.heads, self.queries, self.keys)
            bias = rng.standard_normal(shape).astype(np.float32)
        q, k, v, grad = (jnp.asarray(x, self.dtype) for x in (q, k, v, grad))
        return q, k, v, bias, grad


CASES = st.builds(
    lambda heads, **fields: Case(heads=heads[0], groups=heads[1], **fields),
    queries=st.sampled_from((1, 17, 24, 31)),
    keys=st.sampled_from((31, 40)),
    heads=st.sampled_from(((2, 2), (4, 2), (2, 1))),
    bias_rows=st.sampled_from((0, 1, BATCH)),
    causal=st.booleans(),
    window=st.sampled_from((0, 1, 3, 9)),
    dilation=st.sampled_from((1, 2)),
    segments=st.booleans(),
    globals=st.booleans(),
    pattern=st.booleans(),
    shuffled=st.booleans(),
    aligned=st.booleans(),
    block=st.sampled_from((8, 16)),
    dtype=st.sampled_from(("float32", "bfloat16")),
    seed=st.integers(0, 2**16),
)


def run(fn, case: Case):
    """(output, gradients) as float64 arrays."""
    q, k, v, bias, grad = case.arrays()
    mask = case.mask()

    @jax.jit
    def both(q, k, v, bias):
        out, back = jax.vjp(
            lambda *x: fn(*x[:3], mask, scale=SCALE, bias=x[3]), q, k, v, bias
        )
        return out, back(grad)

    out, grads = both(q, k, v, bias)
    assert out.dtype == q.dtype
    found = (out, *(x for x in grads if x is not None))
    return [np.asarray(x, np.float64) for x in found]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=CASES)
def test_block_by_block_equals_float64(case):
    """Values and gradients, for every mask.

    FlashAttention's own rule (Dao et al. 2022): at most twice the error of a plain
    implementation in the same dtype; or four roundings, where that has hardly any.
    """
    q, k, v, bias, grad = case.arrays()
    allowed = np.asarray(case.mask().allowed())
    allowed = np.broadcast_to(allowed, (BATCH, *allowed.shape[1:]))
    expected, grads = attention_reference(q, k, v, allowed, bias, grad, SCALE)
    plain = run(dot, case)
    found = run(lambda *x, **rest: blockwise(*x, block=case.block, **rest), case)
    unit = float(jnp.finfo(case.dtype).eps)
    for got, simple, want, size in zip(
        found, plain, (expected, *grads), sizes(case, allowed), strict=True
    ):
        assert np.isfinite(got).all()
        rounding = unit * max(1.0, size, np.abs(want).max())
        allowed_error = max(2 * np.abs(simple - want).max(), 4 * rounding)
        assert np.abs(got - want).max() <= allowed_error


def sizes(case: Case, allowed: np.ndarray) -> list[float]:
    """How large the terms are that the output and each gradient are sums of.

    The gradient of a score is its weight times a difference: that of the weight, less
    the mean of those of the query. Where one key is seen it is zero, and roundings of
    the two remain; the gradients of q and k are scaled sums of it times k and q.
    """
    q, k, v, bias, grad = (np.asarray(x, np.float64) for x in case.arrays())
    v = v.repeat(case.heads // case.groups, 2)
    weights = np.where(allowed[:, None], np.einsum("blhe,bshe->bhls", grad, v), 0.0)
    scores = np.abs(weights).max()
    of_q, of_k = (SCALE * scores * np.abs(x).max() for x in (k, q))
    return [0.0, of_q, of_k, 0.0] + [scores] * bool(case.bias_rows)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=CASES)
def test_blocks_that_hold_something_visible_are_visited(case):
    mask = case.mask()
    bq, bk = block_size(case.queries, case.block), block_size(case.keys, case.block)
    padded = pad_mask(mask, bq, bk)
    order, count = (np.asarray(x) for x in visible_blocks(padded, bq, bk))
    allowed = np.asarray(padded.allowed())
    shape = (len(allowed), allowed.shape[1] // bq, bq, allowed.shape[2] // bk, bk)
    holds = allowed.reshape(shape).any((0, 2, 4))
    for row, n, wanted in zip(order, count, holds, strict=True):
        assert set(np.flatnonzero(wanted)) <= set(row[:n].tolist())
        assert (np.diff(row[:n]) > 0).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=CASES)
def test_spans_written_out_hold_all_that_is_visible(case):
    mask = case.mask()
    plan = planned(mask, case.block, SCALE, 0.0)
    assert (plan.spans is None) == (max(case.queries, case.keys) > 2 * case.block)
    if plan.spans is None:
        return
    allowed = np.asarray(mask.allowed())
    for number, (start, keys) in enumerate(plan.spans):
        rows = allowed[:, number * plan.queries : (number + 1) * plan.queries].copy()
        assert 0 <= start < start + keys <= case.keys
        rows[:, :, start : start + keys] = False
        assert not rows.any()


def test_spans_leave_out_what_is_known_to_be_invisible():
    where = np.arange(256, dtype=np.int32)[None]
    mask = Mask(where, where, causal=True, aligned=True)

    def spans(mask):
        return planned(mask, 256, 1.0, 0.0).spans

    assert spans(mask) == ((0, 64), (0, 128), (0, 192), (0, 256))
    assert spans(mask.replace(window=65))[2:] == ((64, 128), (128, 128))
    assert spans(mask.replace(aligned=False)) == ((0, 256),)


PACKED = np.repeat([1, 2, 3], (20, 20, 24))[None].astype(np.int32)


@pytest.mark.parametrize(
    ("mask", "most"),
    [
        ({"causal": True}, 36),
        ({"window": 9}, 8 + 2 * 7),
        ({"window": 9, "causal": True}, 8 + 7),
        ({"pattern": lambda i, j: i // 8 == j // 8}, 8),
        ({"kv_global": np.arange(64)[None] == 3}, 64),
        ({"window": 1, "kv_global": np.arange(64)[None] == 3}, 8 + 7),
        # Segments of blocks 0 to 2, 2 to 4 and 5 to 7.
        ({"q_segments": PACKED, "kv_segments": PACKED, "causal": True}, 17),
    ],
)
def test_blocks_that_hold_nothing_are_not(mask, most):
    where = np.arange(64, dtype=np.int32)[None]
    _, count = visible_blocks(Mask(where, where, **mask), 8, 8)
    assert int(count.sum()) <= most


@pytest.mark.parametrize("length", [16, 24])  # written out; in loops
def test_dropped_weights_keep_the_expectation_and_their_gradient(length):
    case = Case(length, length, 2, 2, causal=True, aligned=True)
    q, k, v, _, grad = case.arrays()
    mask, rate = case.mask(), 0.3

    def drop(rng, q, k, v):
        return blockwise(
            *(q, k, v, mask), scale=SCALE, rng=rng, dropout=rate, block=case.block
        )

    @jax.jit
    def draw(rngs):
        return jax.lax.map(lambda rng: drop(rng, q, k, v), rngs)

    samples = np.asarray(draw(jax.random.split(jax.random.key(0), 600)))
    plain = np.asarray(dot(q, k, v, mask, scale=SCALE))
    error = samples.std(0) / len(samples) ** 0.5
    assert samples.std(0).max() > 0.1
    assert (np.abs(samples.mean(0) - plain) < 5 * error + 1e-6).all()
    # The kept weights of one draw, read off values that are one-hot, are a function of
    # which the backward pass must know the same.
    rng = jax.random.key(3)
    eye = jnp.eye(length)[None, :, None]
    eye = jnp.broadcast_to(eye, (BATCH, length, 2, length))
    weights = jnp.einsum("blhe,bshe->bhls", q, k) * SCALE
    seen = jnp.where(mask.allowed()[:, None], weights, -jnp.inf)
    kept = drop(rng, q, k, eye).transpose(0, 2, 1, 3) / jax.nn.softmax(seen)
    kept = jnp.where(mask.allowed()[:, None], kept, 0)
    factors = np.unique(np.round(kept / (1 / (1 - rate)), 3))
    assert factors.tolist() == [0, 1]

    def same(q, k, v):
        scores = jnp.einsum("blhe,bshe->bhls", q, k) * SCALE
        scores = jnp.where(mask.allowed()[:, None], scores, -1e30)
        weights = jax.nn.softmax(scores) * (kept > 0.5) / (1 - rate)
        return jnp.einsum("bhls,bshe->blhe", weights, v)

    for got, want in zip(
        jax.vjp(lambda *x: drop(rng, *x), q, k, v)[1](grad),
        jax.vjp(same, q, k, v)[1](grad),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_memory_grows_with_the_length_not_its_square():
    def size(fn, length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        where = jnp.arange(length, dtype=jnp.int32)[None]
        mask = Mask.self_attention(where, causal=True, aligned=True)

        def loss(q, k, v):
            return fn(q, k, v, mask, scale=SCALE).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = size(flash, 2048), size(flash, 8192)
    assert long < 5 * short
    assert size(dot, 2048) > 4 * short


# --- local ---


def test_global_tokens_look_through_their_own_projections():
    case = Case(31, 31, 4, 4, window=3, segments=True, globals=True)
    q, k, v, _, _ = case.arrays()
    others = [x + 1 for x in (v, q, k)]
    mask = case.mask()
    out = local(q, k, v, mask, scale=SCALE, of_globals=others)
    chosen = np.asarray(mask.q_global)
    near = np.asarray(mask.replace(q_global=None).allowed())
    far = np.asarray(mask.replace(window=0).allowed())
    assert chosen.any() and not (near == far).all()
    zeros = np.zeros(q.shape)
    plain, _ = attention_reference(q, k, v, near, None, zeros, SCALE)
    special, _ = attention_reference(*others, far, None, zeros, SCALE)
    want = np.where(chosen[..., None, None], special, plain)
    np.testing.assert_allclose(out, want, atol=1e-5)
    both = local(q, k, v, mask, scale=SCALE)
    want, _ = attention_reference(
        q, k, v, np.asarray(mask.allowed()), None, zeros, SCALE
    )
    np.testing.assert_allclose(both, want, atol=1e-5)


@pytest.mark.parametrize("heads", [0, 1, 4])
def test_dilated_heads_take_longer_steps(heads):
    case = Case(31, 31, 4, 4, causal=True, window=3)
    q, k, v, _, _ = case.arrays()
    mask = case.mask()
    out = local(q, k, v, mask, scale=SCALE, dilation=4, dilated_heads=heads)
    for head in range(4):
        far = mask.replace(dilation=4 if head < heads or not heads else 1)
        one = slice(head, head + 1)
        want = dot(*(x[:, :, one] for x in (q, k, v)), far, scale=SCALE)
        np.testing.assert_allclose(out[:, :, one], want, atol=1e-6)


def test_local_without_windows_and_with_wrong_heads():
    case = Case(31, 31, 4, 2, causal=True)
    q, k, v, _, _ = case.arrays()
    mask = case.mask()
    assert mask.window == 0  # unlimited, then
    whole = local(q, k, v, mask, scale=SCALE)
    np.testing.assert_allclose(whole, dot(q, k, v, mask, scale=SCALE), atol=1e-6)
    mask = mask.replace(window=3)
    for heads in (1, 5, -1):
        with pytest.raises(Refused, match=f"dilated_heads={heads}: must"):
            local(q, k, v, mask, scale=SCALE, dilation=2, dilated_heads=heads)


# --- Which way ---

PLAIN = Mask.self_attention(np.arange(64)[None], causal=True, aligned=True)
SEGMENTS = np.ones((2, 64), np.int32)


@pytest.mark.parametrize(
    ("backend", "changes", "path", "reason"),
    [
        ("cpu", {}, "xla", "no kernel for cpu"),
        ("gpu", {}, "cudnn", ""),
        ("gpu", {"dtype": "float32"}, "xla", "cudnn refuses: float32, not bfloat16"),
        ("gpu", {"width": 20}, "xla", "heads of 20"),
        ("gpu", {"width": 256}, "xla", "heads of 256"),
        ("gpu", {"length": 63}, "xla", "odd number"),
        ("gpu", {"dropout": 0.1}, "xla", "dropout"),
        ("gpu", {"window": 9}, "cudnn", ""),
        ("gpu", {"q_segments": SEGMENTS, "kv_segments": SEGMENTS}, "cudnn", ""),
        ("gpu", {"aligned": False, "length": 8192}, "xla", "array of more than 16,777"),
        ("tpu", {"length": 256}, "pallas", ""),
        ("tpu", {}, "xla", "64 queries and 64 keys, not equal multiples of 128"),
        ("tpu", {"aligned": False}, "xla", "positions are not the array indices"),
        ("tpu", {"window": 9}, "xla", "windows"),
        ("tpu", {"dropout": 0.1, "length": 256}, "xla", "dropout"),
    ],
)
def test_the_path_follows_from_the_case(backend, changes, path, reason):
    changes = dict(changes)
    length, width = changes.pop("length", 64), changes.pop("width", 64)
    dtype, dropout = changes.pop("dtype", "bfloat16"), changes.pop("dropout", 0.0)
    x = jax.ShapeDtypeStruct((2, length, 4, width), dtype)
    mask = PLAIN.replace(**changes)
    found = choose("auto", backend, x, x, mask, None, dropout)
    assert found[0] == path
    assert reason in found[1] and bool(reason) == bool(found[1])
    assert choose("xla", backend, x, x, mask, None, dropout)[0] == "xla"
    if path == "xla":
        kernel = {"gpu": "cudnn"}.get(backend, "pallas")
        with pytest.raises(Refused, match=f"path='{kernel}': .*; leave it 'auto'"):
            choose(kernel, backend, x, x, mask, None, dropout)


def test_the_path_is_said_once(capsys):
    sys.modules[flash.__module__]._say_once.cache_clear()
    x = jnp.ones((1, 64, 1, 8))
    silent = contextvars.copy_context()  # a plan's, for other devices perhaps
    silent.run(told.set, False)
    silent.run(lambda: flash(x, x, x, PLAIN, scale=1.0))
    assert not capsys.readouterr().err
    for _ in range(2):
        flash(x, x, x, PLAIN, scale=1.0)
    text = "attention: flash runs through xla (no kernel for cpu)\n"
    assert capsys.readouterr().err == text
    with pytest.raises(Refused, match="path='fast': expected one of auto"):
        flash(x, x, x, PLAIN, scale=1.0, path="fast")


@pytest.mark.parametrize("segments", [False, True])
def test_the_tpus_kernel_computes_the_same(monkeypatch, segments):
    """In Pallas' interpreter, on the CPU."""
    from jax.experimental.pallas import tpu as pltpu

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 128, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 128, 2, 8)).astype(np.float32)
    where = jnp.arange(128, dtype=jnp.int32)[None]
    mask = Mask.self_attention(where, causal=True, aligned=True)
    if segments:
        real = np.repeat([[1], [1]], 128, 1).astype(np.int32)
        real[1, 100:] = 0
        mask = mask.replace(q_segments=real, kv_segments=real)

    with pltpu.force_tpu_interpret_mode():
        found = flash(q, k, v, mask, scale=SCALE, path="pallas")
    np.testing.assert_allclose(found, dot(q, k, v, mask, scale=SCALE), atol=1e-5)
