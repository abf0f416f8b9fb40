"""FlashAttention (Dao et al. 2022; Dao 2023) in XLA: exact, block by block.

For each block of queries the visible blocks of keys are visited one by one with a
running maximum and total (Milakov & Gimelshein 2018). The backward pass computes the
weights again from each query's log-total. Memory grows with L and S, not with their
product; time with the number of blocks that hold anything visible.

The axis of heads is before that of positions ([B, H, L, E]), so that a block's matrix
products read contiguous memory. A few blocks are written out instead of looped over,
each row of them with all of its keys at once, and of causal ones only those that hold
something. For the choice of order and sizes see benchmarks/RESULTS.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from triform.models.algorithms.blocks import (
    block_size,
    pad_axis,
    pad_mask,
    part,
    visible_blocks,
)
from triform.models.mask import Mask

Array = jax.Array

BLOCK = 256
# Up to so many blocks of queries and of keys are written out, without loops (see
# benchmarks/RESULTS.md).
SHORT = 2
# Causal inputs that short are split into so many rows, of so many queries at least.
ROWS, LEAST = 4, 32
# Scores of what is not seen, and the least that a maximum may be: the exponential of
# their difference is zero, also where a query sees nothing at all.
_UNSEEN, _FLOOR = -1e30, -1e29
_F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: sizes of the blocks, factor of the scores, rate of dropout; and,
    of short inputs, for each block of queries the first of the keys that it may see and
    how many follow: no loops are needed then.
    """

    queries: int
    keys: int
    scale: float
    dropout: float | None  # None: the rate is an array, beside the key
    spans: tuple[tuple[int, int], ...] | None


def blockwise(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    bias: Array | None = None,
    rng: Array | None = None,
    dropout: float = 0.0,
    block: int = BLOCK,
) -> Array:
    """What `dot` computes; see there for the shapes. Stores no [L, S] array of its own.

    The weights that dropout keeps are drawn block by block, so not those of `dot`.
    """
    length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    mask = _without_batch(mask)
    rate = dropout if rng is not None else 0.0
    known = isinstance(rate, int | float)
    drop = rng if known else (rng, 1 * rate)
    plan = planned(mask, block, scale, rate if known else None)
    bq, bk = plan.queries, plan.keys
    # [B, L, H, E] -> [B, K, G, L, E]; of one group a view.
    q = pad_axis(q.swapaxes(1, 2), 2, bq)
    q = q.reshape(q.shape[0], groups, heads // groups, *q.shape[2:])
    k, v = (pad_axis(x.swapaxes(1, 2), 2, bk) for x in (k, v))
    if bias is not None:
        bias = pad_axis(pad_axis(bias, 2, bq), 3, bk)
        bias = bias.reshape(len(bias), groups, heads // groups, *bias.shape[2:])
    mask = pad_mask(mask, bq, bk)
    out = _attention(q, k, v, bias, mask, None if plan.dropout == 0 else drop, plan)
    out = out.reshape(out.shape[0], heads, *out.shape[3:])[:, :, :length]
    return out.swapaxes(1, 2)


def _without_batch(mask: Mask) -> Mask:
    """What is known of positions while tracing, written as constants."""
    if not mask.aligned:
        return mask

    def indices(x: Array) -> np.ndarray:
        return np.arange(x.shape[1], dtype=np.int32)[None]

    return mask.replace(
        q_positions=indices(mask.q_positions), kv_positions=indices(mask.kv_positions)
    )


def planned(mask: Mask, block: int, scale: float, dropout: float | None) -> _Plan:
    """How the inputs that `mask` describes are split into blocks of at most `block`."""
    queries, keys = mask.q_positions.shape[1], mask.kv_positions.shape[1]
    if max(queries, keys) > SHORT * block:
        bq, bk = block_size(queries, block), block_size(keys, block)
        return _Plan(bq, bk, scale, dropout, None)
    known = mask.aligned and mask.q_global is None and mask.kv_global is None
    if known and mask.causal:
        # Smaller blocks of queries leave out more of what is not seen.
        block = min(block, max(LEAST, -(-queries // ROWS)))
    bq = block_size(queries, block)
    reach = mask.window * mask.dilation if known and mask.window else queries + keys
    spans = []
    for first in range(0, queries, bq):
        start = min(max(first - reach + 1, 0), keys - 1)
        stop = first + bq + (0 if known and mask.causal else reach)
        spans.append((start, max(min(stop, keys) - start, 1)))
    return _Plan(bq, keys, scale, dropout, tuple(spans))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, bias, mask, drop, plan):
    return _forward(q, k, v, bias, mask, drop, plan)[0]


def _slice(x: Array, start: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x: Array, new: Array, start: Array, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, new, start, axis)


def _added(bias, mask: Mask, query: Array, i: Array, key: Array, j: Array) -> Array:
    """What is added to the scores of queries from slot i on and keys from j on:
    float32, broadcasts to [B, K, G, l, s].
    """
    sizes = query.shape[3], key.shape[2]
    seen = part(mask, i, sizes[0], j, sizes[1]).allowed()
    unseen = jnp.where(seen, 0.0, _UNSEEN).astype(_F32)[:, None, None]
    if bias is None:
        return unseen
    return unseen + _slice(_slice(bias, i, sizes[0], 3), j, sizes[1], 4).astype(_F32)


def _alone(x: Array) -> Array:
    """x, computed once: not for every head, nor inside a product."""
    return lax.optimization_barrier(x)


def _keys_first(x: Array) -> Array:
    """[B, K, G, l, s] -> [B, K, s, G, l]."""
    return jnp.moveaxis(x, 4, 2)


def _merged(x: Array) -> Array:
    """[B, K, G, l, ...] -> [B, K, G l, ...]: all that look at the same keys."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _product(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=_F32)


def _sums(weights: Array, x: Array) -> Array:
    """float32 [B, K, G, l, E]: for each query the weighted sum over x [B, K, s, E]."""
    out = _product("bkms,bkse->bkme", _merged(weights.astype(x.dtype)), x)
    return out.reshape(*weights.shape[:-1], -1)


def _kept(drop: Any, i: Array, j: Array, shape, plan: _Plan) -> Array:
    """float32: 0 where dropout takes a weight of the block that starts at query i and
    key j, else 1 / (1 - rate). `drop` is a key, or (key, rate).
    """
    rng, rate = drop if isinstance(drop, tuple) else (drop, plan.dropout)
    key = jax.random.fold_in(jax.random.fold_in(rng, i), j)
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return keep.astype(_F32) / (1 - rate)


def _forward(q, k, v, bias, mask, drop, plan) -> tuple[Array, Any]:
    def row(_, i: Array, visits: Callable):
        query = _slice(q, i, plan.queries, 3)

        def visit(carry, j: Array, keys: int):
            out, peak, total = carry
            key, value = (_slice(x, j, keys, 2) for x in (k, v))
            scores = _product("bkme,bkse->bkms", _merged(query * plan.scale), key)
            scores = scores.reshape(*query.shape[:-1], keys)
            scores += _alone(_added(bias, mask, query, i, key, j))
            higher = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(peak - higher)
            total = total * shrink + weights.sum(-1)
            if drop is not None:
                weights *= _kept(drop, i, j, weights.shape, plan)
            out = out * shrink[..., None] + _sums(weights, value)
            return out, higher, total

        lead = query.shape[:-1]
        start = (
            jnp.zeros((*lead, v.shape[-1]), _F32),
            jnp.full(lead, _FLOOR),
            jnp.zeros(lead, _F32),
        )
        out, peak, total = visits(visit, start)
        total = jnp.maximum(total, jnp.finfo(_F32).tiny)
        return None, ((out / total[..., None]).astype(q.dtype), peak + jnp.log(total))

    _, (out, log_total) = _rows(row, None, mask, plan)
    return out, (q, k, v, bias, mask, drop, out, log_total)


def _rows(row: Callable, carry: Any, mask: Mask, plan: _Plan) -> tuple[Any, Any]:
    """Every block of queries, one by one: (carry, outputs joined along the queries).

    row(carry, i, visits) -> (carry, outputs [B, K, G, l, ...]) gets the first query
    i; visits(visit, start) is visit(start, first key, keys), of all that it may see.
    """
    if plan.spans is not None:
        parts = []
        for number, span in enumerate(plan.spans):
            visits = functools.partial(lambda span, visit, x: visit(x, *span), span)
            carry, out = row(carry, number * plan.queries, visits)
            parts.append(out)
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x, 3), *parts)
    order, count = visible_blocks(mask, plan.queries, plan.keys)

    def step(carry, i: Array):
        def visits(visit: Callable, start: Any) -> Any:
            def body(t: Array, x: Any) -> Any:
                return visit(x, order[i, t] * plan.keys, plan.keys)

            return lax.fori_loop(0, count[i], body, start)

        return row(carry, i * plan.queries, visits)

    carry, out = lax.scan(step, carry, jnp.arange(len(order)))
    return carry, jax.tree.map(_joined, out)


def _joined(x: Array) -> Array:
    """[blocks, B, K, G, l, ...] -> [B, K, G, L, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _backward(plan: _Plan, kept, grad: Array):
    q, k, v, bias, mask, drop, out, log_total = kept
    # Of a row of the softmax: sum of weights times their gradients (Dao et al., B.4).
    centre = jnp.einsum("bkgle,bkgle->bkgl", grad, out, preferred_element_type=_F32)

    def row(carry, i: Array, visits: Callable):
        query, upper, middle, normal = (
            _slice(x, i, plan.queries, 3) for x in (q, grad, centre, log_total)
        )

        # Scores have the keys first, [B, K, s, G, l]: two of the three products
        # that sum over them then read contiguous memory.
        def products(x: Array, y: Array) -> Array:
            found = _product("bkse,bkme->bksm", x, _merged(y))
            return found.reshape(*found.shape[:3], *y.shape[2:4])

        def visit(carry, j: Array, keys: int):
            dq, dk, dv, dbias = carry
            key, value = (_slice(x, j, keys, 2) for x in (k, v))
            added = _alone(_keys_first(_added(bias, mask, query, i, key, j)))
            scores = products(key, query * plan.scale) + added
            weights = jnp.exp(scores - normal[:, :, None])
            dweights = products(value, upper)
            used = weights
            if drop is not None:
                shape = (*query.shape[:-1], keys)
                keep = _keys_first(_kept(drop, i, j, shape, plan))
                used, dweights = weights * keep, dweights * keep
            dscores = weights * (dweights - middle[:, :, None])
            dv = _put(dv, _slice(dv, j, keys, 2) + _keys(used, upper), j, 2)
            if dbias is not None:
                dbias = _add_bias(dbias, jnp.moveaxis(dscores, 2, 4), i, j)
            dscores *= plan.scale
            dk = _put(dk, _slice(dk, j, keys, 2) + _keys(dscores, query), j, 2)
            scores = dscores.reshape(*dscores.shape[:3], -1).astype(key.dtype)
            if plan.spans is None:
                found = _product("bksm,bkse->bkme", scores, key)
            else:
                # Transposed before the product, which is faster; with the blocks of
                # loops it was slower (see benchmarks/RESULTS.md).
                scores = _alone(scores.swapaxes(2, 3))
                found = _product("bkms,bkse->bkme", scores, key)
            return dq + found.reshape(query.shape), dk, dv, dbias

        start = (jnp.zeros(query.shape, _F32), *carry)
        dq, *carry = visits(visit, start)
        return tuple(carry), dq.astype(q.dtype)

    # Known to be zeros, what is put among them would become a padded product, and of
    # some of those (4 rows of 6 heads, 256 x 256 by 256 x 64, padded to 1,024 rows and
    # added to something) jaxlib 0.10.2's library for CPUs writes past the end.
    zeros = lax.optimization_barrier([jnp.zeros(x.shape, _F32) for x in (k, v)])
    dbias = None if bias is None else jnp.zeros(bias.shape, _F32)
    (dk, dv, dbias), dq = _rows(row, (*zeros, dbias), mask, plan)
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dbias, None, None


def _keys(weights: Array, x: Array) -> Array:
    """float32 [B, K, s, E]: for each key the weighted sum [B, K, s, G, l] of x."""
    weights = weights.reshape(*weights.shape[:3], -1).astype(x.dtype)
    return _product("bksm,bkme->bkse", weights, _merged(x))


def _add_bias(dbias: Array, dscores: Array, i: Array, j: Array) -> Array:
    if len(dbias) == 1:
        dscores = dscores.sum(0, keepdims=True)
    old = _slice(_slice(dbias, i, dscores.shape[3], 3), j, dscores.shape[4], 4)
    return lax.dynamic_update_slice(dbias, old + dscores, (0, 0, 0, i, j))


_attention.defvjp(_forward, _backward)
