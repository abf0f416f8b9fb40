"""Which blocks of a mask hold anything that is seen: the others cost nothing."""

import jax
import jax.numpy as jnp

from triform.models.mask import Mask

Array = jax.Array

# Beyond every position and segment.
_FAR = jnp.iinfo(jnp.int32).max


def block_size(length: int, largest: int) -> int:
    """Slots of a block: equal blocks of at most `largest`, in multiples of 8."""
    count = -(-length // largest)
    return min(largest, -(-length // count // 8) * 8) if count > 1 else length


def pad_axis(x: Array, axis: int, size: int, value: float = 0) -> Array:
    """x with its axis filled up to a multiple of `size`."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    widths = [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def pad_mask(mask: Mask, queries: int, keys: int) -> Mask:
    """The mask with both sides filled up to multiples of a block by empty slots."""

    def fill(x: Array | None, size: int, value: int = 0) -> Array | None:
        return None if x is None else pad_axis(x, 1, size, value)

    return mask.replace(
        q_positions=fill(mask.q_positions, queries, -1),
        kv_positions=fill(mask.kv_positions, keys, -1),
        q_segments=fill(mask.q_segments, queries),
        kv_segments=fill(mask.kv_segments, keys),
        q_global=fill(mask.q_global, queries),
        kv_global=fill(mask.kv_global, keys),
    )


def part(mask: Mask, query: Array, queries: int, key: Array, keys: int) -> Mask:
    """The mask of `queries` and `keys` slots, from slots `query` and `key` on."""

    def sliced(x: Array | None, start: Array, size: int) -> Array | None:
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, 1)

    return mask.replace(
        q_positions=sliced(mask.q_positions, query, queries),
        kv_positions=sliced(mask.kv_positions, key, keys),
        q_segments=sliced(mask.q_segments, query, queries),
        kv_segments=sliced(mask.kv_segments, key, keys),
        q_global=sliced(mask.q_global, query, queries),
        kv_global=sliced(mask.kv_global, key, keys),
    )


def visible_blocks(mask: Mask, queries: int, keys: int) -> tuple[Array, Array]:
    """(order int32 [Q, S], count int32 [Q]): the first `count` of a row of `order` are
    the blocks of `keys` keys that some of its `queries` queries may see, ascending.

    The sides of `mask` are multiples of a block. Blocks are judged by the extremes of
    their positions and segments, in a time that does not depend on their size; a
    pattern, of which nothing is known, is evaluated for every pair of slots.
    """
    i, j = _Extremes(mask.q_positions, queries), _Extremes(mask.kv_positions, keys)
    near = jnp.ones((), bool)
    if mask.window:
        apart = jnp.maximum(j.least[:, None] - i.most[..., None], 0)
        apart = jnp.maximum(apart, i.least[..., None] - j.most[:, None])
        near = apart < mask.window * mask.dilation
    if mask.pattern is not None:
        near &= _pattern_blocks(mask, queries, keys)
    if mask.q_global is not None:
        near |= _any(mask.q_global, queries)[..., None]
    if mask.kv_global is not None:
        near |= _any(mask.kv_global, keys)[:, None]
    seen = near & i.filled[..., None] & j.filled[:, None]
    if mask.causal:
        seen &= j.least[:, None] <= i.most[..., None]
    if mask.q_segments is not None:
        a = _Extremes(mask.q_segments - 1, queries)
        b = _Extremes(mask.kv_segments - 1, keys)
        seen &= a.least[..., None] <= b.most[:, None]
        seen &= b.least[:, None] <= a.most[..., None]
    seen = seen.any(0)
    return jnp.argsort(~seen, axis=1).astype(jnp.int32), seen.sum(1).astype(jnp.int32)


class _Extremes:
    """Least and most of what is not negative in each block, [B, blocks]."""

    def __init__(self, x: Array, size: int):
        x = x.reshape(x.shape[0], -1, size)
        self.filled = (x >= 0).any(-1)
        self.least = jnp.where(x >= 0, x, _FAR).min(-1)
        self.most = x.max(-1)


def _any(x: Array, size: int) -> Array:
    return x.reshape(x.shape[0], -1, size).any(-1)


def _pattern_blocks(mask: Mask, queries: int, keys: int) -> Array:
    """bool [B, blocks of queries, blocks of keys]: does the pattern hold anywhere."""
    i = mask.q_positions.reshape(mask.q_positions.shape[0], -1, queries)
    j = mask.kv_positions[:, None]

    def row(i: Array) -> Array:
        holds = mask.pattern(i[..., None], j) & (i >= 0)[..., None] & (j >= 0)
        return holds.any(1).reshape(len(holds), -1, keys).any(-1)

    return jnp.moveaxis(jax.lax.map(row, jnp.moveaxis(i, 1, 0)), 0, 1)
