"""FlashAttention (Dao et al. 2022; Dao 2023) in XLA: exact, block by block.

For each block of queries the visible blocks of keys are visited in turn with a running
maximum and total (Milakov & Gimelshein 2018). The backward pass computes the weights
anew from each query's log-total. Memory grows with L and S, not with their product;
time with the number of blocks that hold anything visible.

Heads stand before places ([B, H, L, E]), so that a block's matrix products read what
lies together. In a prototype of these loops on 2 CPU cores (float32, forward and
backward of 6 causal heads of 64, at 256, 1,024 and 4,096 places) that, with blocks of
256 x 256, was the fastest of both orders and of blocks of 128 to 512 queries and 128 to
1,024 keys. benchmarks/attention.py measures what stands here.
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
# Scores of what is not seen, and the least that a maximum may be: the exponential of
# their difference is zero, also where a query sees nothing at all.
_UNSEEN, _FLOOR = -1e30, -1e29
_F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: sizes of the blocks, factor of the scores, rate of dropout."""

    queries: int
    keys: int
    scale: float
    dropout: float


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
    bq, bk = block_size(length, block), block_size(k.shape[1], block)
    plan = _Plan(bq, bk, scale, dropout if rng is not None else 0.0)
    # [B, L, H, E] -> [B, K, G, L, E]; of one group a view.
    q = pad_axis(q.swapaxes(1, 2), 2, bq)
    q = q.reshape(q.shape[0], groups, heads // groups, *q.shape[2:])
    k, v = (pad_axis(x.swapaxes(1, 2), 2, bk) for x in (k, v))
    if bias is not None:
        bias = pad_axis(pad_axis(bias, 2, bq), 3, bk)
        bias = bias.reshape(len(bias), groups, heads // groups, *bias.shape[2:])
    mask = pad_mask(mask, bq, bk)
    out = _attention(q, k, v, bias, mask, rng if plan.dropout else None, plan)
    out = out.reshape(out.shape[0], heads, *out.shape[3:])[:, :, :length]
    return out.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, bias, mask, rng, plan):
    return _forward(q, k, v, bias, mask, rng, plan)[0]


def _cut(x: Array, block: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _put(x: Array, new: Array, block: Array, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, new, block * new.shape[axis], axis)


def _scores(q: Array, k: Array, bias, mask: Mask, i: Array, j: Array, plan) -> Array:
    """float32 [B, K, G, l, s] of block q [B, K, G, l, E] and block k [B, K, s, E]."""
    scores = jnp.einsum(
        "bkgle,bkse->bkgls", q * plan.scale, k, preferred_element_type=_F32
    )
    if bias is not None:
        cut = _cut(_cut(bias, i, plan.queries, 3), j, plan.keys, 4)
        scores += cut.astype(_F32)
    seen = part(mask, i, plan.queries, j, plan.keys).allowed()
    # Made once for all heads: fused into what follows, each would work it out again.
    unseen = lax.optimization_barrier(jnp.where(seen, 0.0, _UNSEEN).astype(_F32))
    return scores + unseen[:, None, None]


def _kept(rng: Array, i: Array, j: Array, shape, plan: _Plan) -> Array:
    """float32: 0 where dropout takes a weight of block (i, j), else 1 / (1 - rate)."""
    key = jax.random.fold_in(jax.random.fold_in(rng, i), j)
    keep = jax.random.bernoulli(key, 1 - plan.dropout, shape)
    return keep.astype(_F32) / (1 - plan.dropout)


def _forward(q, k, v, bias, mask, rng, plan) -> tuple[Array, Any]:
    order, count = _visible(mask, plan)
    lead = (*q.shape[:3], plan.queries)

    def row(_, i: Array):
        query = _cut(q, i, plan.queries, 3)

        def visit(t: Array, carry):
            out, peak, total = carry
            j = 0 if count is None else order[i, t]
            key, value = (_cut(x, j, plan.keys, 2) for x in (k, v))
            scores = _scores(query, key, bias, mask, i, j, plan)
            higher = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(peak - higher)
            total = total * shrink + weights.sum(-1)
            if plan.dropout:
                weights *= _kept(rng, i, j, weights.shape, plan)
            out = out * shrink[..., None] + jnp.einsum(
                "bkgls,bkse->bkgle",
                weights.astype(value.dtype),
                value,
                preferred_element_type=_F32,
            )
            return out, higher, total

        start = (
            jnp.zeros((*lead, v.shape[-1]), _F32),
            jnp.full(lead, _FLOOR),
            jnp.zeros(lead, _F32),
        )
        out, peak, total = _visits(count, i, visit, start)
        total = jnp.maximum(total, jnp.finfo(_F32).tiny)
        return None, ((out / total[..., None]).astype(q.dtype), peak + jnp.log(total))

    _, (out, log_total) = _rows(row, None, order)
    out = _joined(out)
    return out, (q, k, v, bias, mask, rng, out, log_total)


def _visits(count: Array, i: Array, visit: Callable, start: Any) -> Any:
    """What visits of all visible blocks of keys make of `start`."""
    if count is None:
        return visit(0, start)
    return lax.fori_loop(0, count[i], visit, start)


def _rows(row: Callable, carry: Any, order: Array) -> tuple[Any, Any]:
    """scan of `row` over the blocks of queries; one block alone needs no loop."""
    if len(order) > 1:
        return lax.scan(row, carry, jnp.arange(len(order)))
    carry, out = row(carry, 0)
    return carry, jax.tree.map(lambda x: x[None], out)


def _visible(mask: Mask, plan: _Plan) -> tuple[Array, Array | None]:
    """visible_blocks, with no count of a single block of keys: it is always visited."""
    if mask.kv_positions.shape[1] > plan.keys:
        return visible_blocks(mask, plan.queries, plan.keys)
    return np.zeros((mask.q_positions.shape[1] // plan.queries, 1), np.int32), None


def _joined(x: Array) -> Array:
    """[blocks, B, K, G, l, E] -> [B, K, G, L, E]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _backward(plan: _Plan, kept, grad: Array):
    q, k, v, bias, mask, rng, out, log_total = kept
    order, count = _visible(mask, plan)
    # Of a row of the softmax: sum of weights times their gradients (Dao et al., B.4).
    centre = jnp.einsum("bkgle,bkgle->bkgl", grad, out, preferred_element_type=_F32)

    def row(carry, i: Array):
        query, upper = (_cut(x, i, plan.queries, 3) for x in (q, grad))
        middle = _cut(centre, i, plan.queries, 3)[..., None]

        def visit(t: Array, carry):
            dq, dk, dv, dbias = carry
            j = 0 if count is None else order[i, t]
            key, value = (_cut(x, j, plan.keys, 2) for x in (k, v))
            scores = _scores(query, key, bias, mask, i, j, plan)
            weights = jnp.exp(scores - log_total[i][..., None])
            dweights = jnp.einsum(
                "bkgle,bkse->bkgls", upper, value, preferred_element_type=_F32
            )
            used = weights
            if plan.dropout:
                keep = _kept(rng, i, j, weights.shape, plan)
                used, dweights = weights * keep, dweights * keep
            dscores = weights * (dweights - middle)
            dv = _put(dv, _cut(dv, j, plan.keys, 2) + _keys(used, upper), j, 2)
            if dbias is not None:
                dbias = _add_bias(dbias, dscores, i, j, plan)
            dscores *= plan.scale
            dk = _put(dk, _cut(dk, j, plan.keys, 2) + _keys(dscores, query), j, 2)
            dq += jnp.einsum(
                "bkgls,bkse->bkgle",
                dscores.astype(key.dtype),
                key,
                preferred_element_type=_F32,
            )
            return dq, dk, dv, dbias

        start = (jnp.zeros(query.shape, _F32), *carry)
        dq, *carry = _visits(count, i, visit, start)
        return tuple(carry), dq.astype(q.dtype)

    zeros = (jnp.zeros(x.shape, _F32) for x in (k, v))
    dbias = None if bias is None else jnp.zeros(bias.shape, _F32)
    (dk, dv, dbias), dq = _rows(row, (*zeros, dbias), order)
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return _joined(dq), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None, None


def _keys(weights: Array, x: Array) -> Array:
    """float32 [B, K, s, E]: for each key the sum over its queries."""
    return jnp.einsum(
        "bkgls,bkgle->bkse", weights.astype(x.dtype), x, preferred_element_type=_F32
    )


def _add_bias(dbias: Array, dscores: Array, i: Array, j: Array, plan: _Plan) -> Array:
    if len(dbias) == 1:
        dscores = dscores.sum(0, keepdims=True)
    old = _cut(_cut(dbias, i, plan.queries, 3), j, plan.keys, 4)
    at = (0, 0, 0, i * plan.queries, j * plan.keys)
    return lax.dynamic_update_slice(dbias, old + dscores, at)


_attention.defvjp(_forward, _backward)
