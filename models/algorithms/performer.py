"""FAVOR+: attention by random features, linear in length (Choromanski et al. 2021).

exp(q k) is the expectation of phi(q) phi(k) for random features phi (features.py), so
that the sums over keys of phi(k) and of phi(k) v^T serve all queries alike.

A sum over keys keeps, feature by feature, the largest logarithm in it, its peak, as a
factor apart; and a query the largest sum of one of its own and such a peak. One term of
its denominator is then exactly 1, however long queries and keys are, and what
underflows is nothing beside it. For this to hold in the causal case too, no sum that a
query reads may hold a key that it may not see, not even under a mask: see `_weights`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from triform.models.algorithms.blocks import pad_axis
from triform.models.algorithms.features import KERNELS, log_features, projection
from triform.models.mask import Mask, Refused

Array = jax.Array

# Slots whose pairs are computed one by one: larger blocks take more exponentials,
# smaller ones more products of small matrices and more time to compile.
SMALLEST = 8
# Logarithm of a feature of what is not seen, and the least that a peak may be: the
# exponential of their difference is zero, also where nothing is seen at all.
_UNSEEN, _FLOOR = -1e30, -1e29
_F32 = jnp.float32
_NAME = "model.trunk.attention='performer':"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The options, checked."""

    features: int = 256
    kernel: str = "softmax"
    redraw: bool = True
    orthogonal: bool = True
    seed: int = 0
    chunk: int = 128

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                value = getattr(self, name)
                raise Refused(
                    f"model.trunk.attention_options: {name}={value!r}: {rule}"
                )

        def between(name: str, least: int, most: int) -> bool:
            value = getattr(self, name)
            return type(value) is int and least <= value <= most

        ok = between("features", 1, 2**20)
        require(ok, "features", "must be a whole number from 1 to 2**20; set 256")
        rule = f"expected one of {', '.join(KERNELS)}"
        require(self.kernel in KERNELS, "kernel", rule)
        for name in ("redraw", "orthogonal"):
            ok = isinstance(getattr(self, name), bool)
            require(ok, name, "must be True or False")
        ok = between("seed", 0, 2**32 - 1)
        require(ok, "seed", "must be a whole number from 0 to 2**32 - 1")
        ok = between("chunk", 1, 2**20) and self.chunk & (self.chunk - 1) == 0
        require(ok, "chunk", "must be a power of two, to be halved; set 128")

    def size(self, length: int) -> int:
        """Places of a chunk: a power of two."""
        return min(self.chunk, 1 << (length - 1).bit_length())


def performer(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    bias: Array | None = None,
    rng: Array | None = None,
    dropout: float = 0.0,
    features: int = _Plan.features,
    kernel: str = _Plan.kernel,
    redraw: bool = _Plan.redraw,
    orthogonal: bool = _Plan.orthogonal,
    seed: int = _Plan.seed,
    chunk: int = _Plan.chunk,
) -> Array:
    """Attention with weights phi(q) phi(k), and no [L, S] array (section 2, B.1).

    q [B, L, H, E], k and v [B, S, K, E] with K dividing H -> [B, L, H, E] in the dtype
    of q, computed in float32. Time and memory grow with L and S, backward too.

    Options: `features` M; `kernel` "softmax", an unbiased estimate of what `dot` takes
    the exponential of (2.3), or "relu" (generalised attention, 2.2); `orthogonal` rows
    of the projection (2.4); `chunk` slots at a time, a power of two.

    The projection belongs to `seed`; but where `rng` is given and `redraw` is on it is
    drawn from `rng`, anew at each step of training. That is the default, as it is the
    authors' for softmax: what is trained with one draw learns that draw's error, and
    then holds for no other seed or number of features. One draw serves all heads.

    Of masks it takes positions, segments and `causal`. Bidirectional attention: any of
    them. Causal attention is of a sequence on itself and reads it from left to right:
    in each row the filled slots have segments that never fall and, within a segment,
    positions that rise, with empty slots anywhere between; a row that breaks this gets
    NaN. Raises Refused for what it cannot do: a bias, windows, patterns, global
    tokens, dropout of weights.
    """
    plan = _Plan(features, kernel, redraw, orthogonal, seed, chunk)
    _refuse(mask, bias, dropout if rng is not None else 0.0)
    batch, length, width = q.shape[0], q.shape[1], q.shape[3]
    drawn = rng if redraw else None
    w = projection(features, width, orthogonal=orthogonal, seed=seed, rng=drawn)
    run = _Run(w, plan, scale)
    q_segments = _numbered(mask.q_positions, mask.q_segments, batch)
    k_segments = _numbered(mask.kv_positions, mask.kv_segments, batch)
    args = q, k, v, q_segments, k_segments
    if mask.causal:
        if length != k.shape[1]:
            raise Refused(
                f"{_NAME} causal attention of {length} queries to {k.shape[1]} keys, "
                "but it must be of a sequence on itself; decode with PerformerState, "
                "or set another attention"
            )
        out = run.causal(*args)
        if not mask.aligned or mask.q_segments is not None:
            fine = _in_order(mask, q_segments, k_segments)
            out = jnp.where(fine[:, None, None, None, None], out, jnp.nan)
    elif mask.q_segments is None:
        out = run.bidirectional(*args)
    else:
        # Padded rows have one segment each, and no need of the dearer way.
        several = (k_segments > 0) & (k_segments < k_segments.max(1, keepdims=True))
        # Without the checkpoint its residuals would be stored even when not taken.
        packed = jax.checkpoint(run.packed)
        out = lax.cond(several.any(), packed, run.bidirectional, *args)
    return out.reshape(q.shape).astype(q.dtype)


def _refuse(mask: Mask, bias: Array | None, dropout: float) -> None:
    """Refused for what random features cannot do."""
    once = "but the keys that are seen are summed once for all queries"
    if bias is not None:
        raise Refused(
            f"{_NAME} a bias of shape {bias.shape}, but there are no scores to add it "
            "to; set model.trunk.positions to rotary, learned or sinusoidal, or take "
            "another attention"
        )
    if mask.window or mask.dilation != 1:
        raise Refused(
            f"{_NAME} a window of {mask.window}, dilation {mask.dilation}, {once}; set "
            "model.trunk.windows=() or model.trunk.attention='local'"
        )
    for name in ("pattern", "q_global", "kv_global"):
        if getattr(mask, name) is not None:
            raise Refused(
                f"{_NAME} a mask with {name}, {once}; use masks without it, or set "
                "model.trunk.attention='flash'"
            )
    if dropout > 0:
        raise Refused(
            f"{_NAME} attention_dropout={dropout}, but there are no weights to drop; "
            "set model.trunk.attention_dropout=0"
        )


def _numbered(positions: Array, segments: Array | None, batch: int) -> Array:
    """int32 [B, S]: the segment of each slot, 0 where it is empty or padding."""
    if segments is None:
        segments = jnp.ones_like(positions)
    segments = jnp.where(positions >= 0, jnp.maximum(segments, 0), 0)
    return jnp.broadcast_to(segments, (batch, segments.shape[1]))


def _in_order(mask: Mask, q_segments: Array, k_segments: Array) -> Array:
    """bool [B]: whether causal attention may read the row from left to right."""
    where = jnp.broadcast_to(mask.kv_positions, k_segments.shape)
    filled = k_segments > 0
    slot = jnp.where(filled, jnp.arange(filled.shape[1]), -1)
    last = jnp.pad(lax.cummax(slot, 1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    before, at = (
        jnp.take_along_axis(x, jnp.maximum(last, 0), 1) for x in (k_segments, where)
    )
    rises = (k_segments > before) | ((k_segments == before) & (where > at))
    itself = (q_segments == k_segments) & (~filled | (mask.q_positions == where))
    return (itself & (~filled | (last < 0) | rises)).all(1)


class _Sums(NamedTuple):
    """Sums over keys of the last segment met, each feature's over exp(its peak)."""

    values: Array  # float32 [B, K, M, E]: of phi(k) v^T
    total: Array  # float32 [B, K, M]: of phi(k)
    peak: Array  # float32 [B, K, M]: the largest log phi(k)
    segment: Array  # int32 [B]; 0: none yet

    @classmethod
    def empty(cls, lead: tuple[int, ...], width: int, segment: Array) -> "_Sums":
        """Nothing, of lead (.., B, K, M) and heads of `width`."""
        zeros, peak = jnp.zeros(lead, _F32), jnp.full(lead, _FLOOR, _F32)
        return cls(jnp.zeros((*lead, width), _F32), zeros, peak, segment)

    def absorb(self, b: Array, v: Array, segments: Array) -> "_Sums":
        """With keys, b = log phi(k) [B, K, C, M], and values [B, K, C, E]."""
        segment = jnp.maximum(self.segment, segments.max(1))
        own = (segments == segment[:, None]) & (segments > 0)
        b = jnp.where(own[:, None, :, None], b, _UNSEEN)
        # The floor erases the sums of a segment that is over.
        same = (segment == self.segment)[:, None, None]
        before = jnp.where(same, self.peak, _FLOOR)
        peak = jnp.maximum(before, lax.stop_gradient(b).max(2))
        kept = jnp.exp(before - peak)
        phi = jnp.exp(b - peak[:, :, None])
        values = jnp.einsum("bkcm,bkce->bkme", phi, v, preferred_element_type=_F32)
        values += self.values * kept[..., None]
        return _Sums(values, self.total * kept + phi.sum(2), peak, segment)

    def read(self, a: Array, segments: Array) -> tuple[Array, Array, Array]:
        """(numerators [B, K, G, C, E], denominators [B, K, G, C], peaks [B, K, G, C]):
        what queries, a = log phi(q) [B, K, G, C, M], get, over exp(peaks)."""
        sees = (segments == self.segment[:, None]) & (segments > 0)
        phi, peak = _over_peak(a + self.peak[:, :, None, None], sees)
        return (
            jnp.einsum("bkgcm,bkme->bkgce", phi, self.values),
            jnp.einsum("bkgcm,bkm->bkgc", phi, self.total),
            peak,
        )


def _over_peak(a: Array, sees: Array) -> tuple[Array, Array]:
    """(exp(a - peak) [B, K, G, .., M], peak [B, K, G, ..] of each query): none, and the
    floor, for those that see [B, ..] nothing."""
    peak = lax.stop_gradient(a).max(-1)
    sees = sees[:, None, None]
    phi = jnp.where(sees[..., None], jnp.exp(a - peak[..., None]), 0.0)
    return phi, jnp.where(sees, peak, _FLOOR)


def _weights(
    a: Array, b: Array, q_segments: Array, k_segments: Array
) -> tuple[Array, Array]:
    """(weights [B, K, G, C, C] of the queries of a chunk on its keys up to their own
    slots, over the exponentials of peaks [B, K, G, C]).

    a = log phi(q) [B, K, G, C, M], b = log phi(k) [B, K, C, M]. A product of the two
    needs a peak that all its keys share, and with one of the whole chunk a key could
    push those before it below the least float: the future would erase the past. So the
    chunk is halved, and its halves again: the keys of a product, of a left half, all
    lie before its queries, of a right half. That is also half of the multiplications.
    """
    size = a.shape[3]
    half = min(size, SMALLEST)
    square, peak = _one_by_one(a, b, q_segments, k_segments, half)
    peaks, found = [peak.reshape(a.shape[:4])], []
    while half < size:
        lower, peak = _right_on_left(a, b, q_segments, k_segments, half)
        nothing = jnp.full_like(peak, _FLOOR)
        peaks.append(jnp.stack([nothing, peak], -2).reshape(a.shape[:4]))
        found.append(lower)
        half *= 2
    top = functools.reduce(jnp.maximum, peaks)
    scales = [jnp.exp(peak - top) for peak in peaks]
    square *= scales[0].reshape(square.shape[:-1])[..., None]
    # From the weights of blocks on themselves [.., blocks, h, h] to those of pairs.
    for lower, scale in zip(found, scales[1:], strict=True):
        pairs, half = lower.shape[-3:-1]
        scale = scale.reshape(*scale.shape[:3], pairs, 2, half)[..., 1, :]
        square = square.reshape(*square.shape[:3], pairs, 2, half, half)
        left, right = square[..., 0, :, :], square[..., 1, :, :]
        upper = jnp.concatenate([left, jnp.zeros_like(left)], -1)
        lower = jnp.concatenate([lower * scale[..., None], right], -1)
        square = jnp.concatenate([upper, lower], -2)
    return square[..., 0, :, :], top


def _one_by_one(a, b, q_segments, k_segments, size: int) -> tuple[Array, Array]:
    """(weights [B, K, G, blocks, size, size], peaks [B, K, G, blocks, size]) of blocks
    of `size` slots on themselves."""
    a = a.reshape(*a.shape[:3], -1, size, 1, a.shape[-1])
    b = b.reshape(*b.shape[:2], 1, -1, 1, size, b.shape[-1])
    i = q_segments.reshape(len(q_segments), -1, size, 1)
    j = k_segments.reshape(len(k_segments), -1, 1, size)
    sees = (i == j) & (j > 0) & jnp.tril(jnp.ones((size, size), bool))
    logs = jnp.where(sees[:, None, None, ..., None], a + b, _UNSEEN)
    peak = jnp.maximum(lax.stop_gradient(logs).max((-1, -2)), _FLOOR)
    return jnp.exp(logs - peak[..., None, None]).sum(-1), peak


def _right_on_left(a, b, q_segments, k_segments, half: int) -> tuple[Array, Array]:
    """(weights [B, K, G, pairs, half, half], peaks [B, K, G, pairs, half]) of queries
    in the right half on keys in the left half of pairs of blocks."""

    def of(x: Array, axis: int, side: int) -> Array:
        x = x.reshape(*x.shape[:axis], -1, 2, half, *x.shape[axis + 1 :])
        return lax.index_in_dim(x, side, axis + 1, keepdims=False)

    a, b = of(a, 3, 1), of(b, 2, 0)
    q_segments, k_segments = of(q_segments, 1, 1), of(k_segments, 1, 0)
    # Segments never fall: only the last of the left may go on to the right.
    segment = k_segments.max(-1, keepdims=True)
    own = (k_segments == segment) & (segment > 0)
    b = jnp.where(own[:, None, ..., None], b, _UNSEEN)
    of_keys = jnp.maximum(lax.stop_gradient(b).max(3, keepdims=True), _FLOOR)
    sees = (q_segments == segment) & (segment > 0)
    phi, peak = _over_peak(a + of_keys[:, :, None], sees)
    return jnp.einsum("bkgpim,bkpjm->bkgpij", phi, jnp.exp(b - of_keys)), peak


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The ways through a sequence, chunk by chunk, with one projection w [M, E].

    All take q, k, v, see `performer`, and segments [B, L] and [B, S], 0: nothing there;
    and return float32 [B, L, K, G, E]. The backward pass computes chunks again.
    """

    w: Array | np.ndarray
    plan: _Plan
    scale: float

    def causal(self, q, k, v, q_segments, k_segments) -> Array:
        """Queries see the keys of their segment up to their own slots."""
        return self.prefix(self.empty(k), q, k, v, q_segments, k_segments)[0]

    def prefix(self, sums, q, k, v, q_segments, k_segments) -> tuple[Array, _Sums]:
        """`causal` that goes on from what `sums` hold; and the sums it ends with."""
        size = self.plan.size(q.shape[1])

        def chunk(sums: _Sums, x) -> tuple[_Sums, Array]:
            q, k, v, q_segments, k_segments = x
            a, b = self.logs(q), self.logs(k)
            before, total, peak = sums.read(a, q_segments)
            weights, within = _weights(a, b, q_segments, k_segments)
            top = jnp.maximum(peak, within)
            peak, within = jnp.exp(peak - top), jnp.exp(within - top)
            weights = weights * within[..., None]
            out = jnp.einsum("bkgij,bkje->bkgie", weights, v.astype(_F32))
            out = _divide(
                out + before * peak[..., None], weights.sum(-1) + total * peak
            )
            return sums.absorb(b, v, k_segments), out

        segments = (_slots(x, size) for x in (q_segments, k_segments))
        xs = _grouped(q, k, size), _chunks(k, size), _chunks(v, size), *segments
        sums, out = _scan(chunk, sums, xs)
        return _joined(out, q.shape[1]), sums

    def bidirectional(self, q, k, v, q_segments, k_segments) -> Array:
        """Queries see the keys of their segment; each row's keys are of one segment."""
        size = self.plan.size(k.shape[1])

        def absorb(sums: _Sums, x) -> tuple[_Sums, None]:
            k, v, segments = x
            return sums.absorb(self.logs(k), v, segments), None

        xs = _chunks(k, size), _chunks(v, size), _slots(k_segments, size)
        sums, _ = _scan(absorb, self.empty(k), xs)

        def read(_, x) -> tuple[None, Array]:
            q, segments = x
            return None, _divide(*sums.read(self.logs(q), segments)[:2])

        size = self.plan.size(q.shape[1])
        xs = _grouped(q, k, size), _slots(q_segments, size)
        _, out = _scan(read, None, xs)
        return _joined(out, q.shape[1])

    def packed(self, q, k, v, q_segments, k_segments) -> Array:
        """Queries see the keys of their segment; any segments in any order.

        Keys and queries are put into one sequence, segment by segment, the keys of each
        before its queries: there it is `causal`.
        """
        keys = k.shape[1]
        order = jnp.argsort(jnp.concatenate([2 * k_segments, 2 * q_segments + 1], 1), 1)
        asks = order >= keys
        query, key = jnp.where(asks, order - keys, 0), jnp.where(asks, 0, order)

        def take(x: Array, at: Array) -> Array:
            at = at.reshape(*at.shape, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, at, 1)

        out = self.causal(
            *(take(q, query), take(k, key), take(v, key)),
            jnp.where(asks, take(q_segments, query), 0),
            jnp.where(asks, 0, take(k_segments, key)),
        )
        return take(out, jnp.argsort(order, 1)[:, keys:])

    def empty(self, k: Array) -> _Sums:
        """For keys [B, S, K, E]."""
        batch, _, heads, width = k.shape
        lead = batch, heads, self.plan.features
        return _Sums.empty(lead, width, jnp.zeros(batch, jnp.int32))

    def logs(self, x: Array) -> Array:
        """log phi [..., M] of queries or keys [..., E]."""
        x = x.astype(_F32) * self.scale**0.5
        return log_features(x, self.w, self.plan.kernel)


def _scan(fn: Callable, carry, xs):
    """lax.scan that keeps for the backward pass what goes into each step, no more."""
    return lax.scan(jax.checkpoint(fn, prevent_cse=False), carry, xs)


def _chunks(x: Array, size: int) -> Array:
    """[B, S, K, E] -> [chunks, B, K, size, E]: heads before slots, for products."""
    x = pad_axis(x, 1, size).swapaxes(1, 2)
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, x.shape[3]), 2, 0)


def _grouped(q: Array, k: Array, size: int) -> Array:
    """[B, L, H, E] -> [chunks, B, K, G, size, E]."""
    q = _chunks(q, size)
    return q.reshape(*q.shape[:2], k.shape[2], -1, *q.shape[3:])


def _slots(segments: Array, size: int) -> Array:
    """[B, S] -> [chunks, B, size]; what is added is empty."""
    x = pad_axis(segments, 1, size)
    return x.reshape(len(x), -1, size).swapaxes(0, 1)


def _joined(x: Array, length: int) -> Array:
    """[chunks, B, K, G, size, E] -> [B, L, K, G, E]."""
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :length]


def _divide(out: Array, total: Array) -> Array:
    """Zeros where a query sees nothing; everywhere else its total is at least 1."""
    return out / jnp.where(total > 0, total, 1.0)[..., None]


@struct.dataclass
class PerformerState:
    """What decoding carries for one layer: the sums over all tokens before.

    Its size does not depend on their number. See _Sums; [N, B, ..] scanned.
    """

    values: Array  # float32 [B, K, M, E]
    total: Array  # float32 [B, K, M]
    peak: Array  # float32 [B, K, M]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str, **options) -> "PerformerState":
        """Of keys' shape [.., B, S, K, E] and the algorithm's options.

        float32 whatever the dtype: it sums thousands of tokens.
        """
        *lead, _, heads, width = shape
        lead = *lead, heads, _Plan(**options).features
        return cls(*_Sums.empty(lead, width, None)[:3])

    def attend(
        self,
        algorithm: Callable,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask,
        index: Array,
        *,
        scale: float,
        bias: Array | None = None,
        rng: Array | None = None,
        dropout: float = 0.0,
        **options,
    ) -> tuple[Array, "PerformerState"]:
        """The next l tokens see all before them and themselves: query [B, l, H, E], key
        and value [B, l, K, E] -> ([B, l, H, E], state).

        Of the mask only q_positions count, negative for empty slots, anywhere. Features
        are those of the seed, whatever `rng`. One segment a row.
        """
        plan = _Plan(**options)
        _refuse(mask, bias, dropout if rng is not None else 0.0)
        kind = {"orthogonal": plan.orthogonal, "seed": plan.seed}
        run = _Run(projection(plan.features, key.shape[3], **kind), plan, scale)
        filled = _numbered(mask.q_positions, None, len(query))
        one = jnp.ones(len(query), jnp.int32)
        sums = _Sums(self.values, self.total, self.peak, one)
        out, sums = run.prefix(sums, query, key, value, filled, filled)
        return out.reshape(query.shape).astype(query.dtype), PerformerState(*sums[:3])
