"""Ranks among many items: part of the table at a time, so that memory is bounded.

Where items have equal scores, every order of them is equally likely: a rank is a
distribution, and a metric its expectation. A model that scores all items alike is right
by chance, whichever item comes first in the table.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
CHUNK = 4096  # items that are scored at once
CUTOFFS = (5, 10, 20)
NAMES = (*(f"{m}_{k}" for k in CUTOFFS for m in ("hr", "ndcg")), "mrr")


@struct.dataclass
class Ranked:
    """Where an item stands among others; each [B], float32."""

    above: Array  # how many have a higher score
    ties: Array  # how many others have the same score
    score: Array  # its own
    log_z: Array  # log of the sum of exp(score) of all, it among them

    def place(self) -> Array:
        """Expected rank, from 1."""
        return self.above + 1 + self.ties / 2

    def metrics(self) -> dict[str, Array]:
        """{name of NAMES: [B]}: hit rate, NDCG and reciprocal rank, one relevant item.

        ndcg_k is 1 / log2(1 + rank) up to rank k.
        """
        found, last = {}, self.above + self.ties
        count = self.ties + 1
        for k in CUTOFFS:
            gains = 1 / np.log2(np.arange(2, k + 2))
            sums = jnp.asarray(np.concatenate([[0], np.cumsum(gains)]), jnp.float32)
            low, high = (jnp.minimum(x, k) for x in (self.above, last + 1))
            found[f"hr_{k}"] = (high - low) / count
            gained = sums[high.astype(jnp.int32)] - sums[low.astype(jnp.int32)]
            found[f"ndcg_{k}"] = gained / count
        # Sum of 1 / rank over the ranks that it may have; digamma(n + 1) - digamma(m +
        # 1) is the sum from m + 1 to n.
        digamma = jax.scipy.special.digamma
        several = (digamma(last + 2) - digamma(self.above + 1)) / count
        found["mrr"] = jnp.where(self.ties > 0, several, 1 / (self.above + 1))
        return found


def ranked(
    states: Array, items: Array, own: Array, left_out: Array | None = None
) -> Ranked:
    """Of item own[b] among all of items [V, W] by their products with states [B, W].

    `left_out` int32 [B, N]: items that are no rivals (own is never left out); -1: none.
    """

    def found(scores: Array, ids: Array) -> Array:
        mine = jnp.where(ids == own[:, None], scores, 0.0).sum(-1)
        real = jnp.where(ids >= 0, scores, -jnp.inf)
        return jnp.stack([mine, jax.nn.logsumexp(real, -1)])

    parts = _over_chunks(states, items, found)  # [chunks, 2, B]
    # Taken from the same products: another sum's rounding would make or break ties.
    score, log_z = parts[:, 0].sum(0), jax.nn.logsumexp(parts[:, 1], 0)

    def rivals(scores: Array, ids: Array) -> Array:
        rival = (ids >= 0) & (ids != own[:, None])
        if left_out is not None:
            rival &= (ids[..., None] != left_out[:, None]).all(-1)
        compared = scores > score[:, None], scores == score[:, None]
        return jnp.stack([(x & rival).sum(-1) for x in compared])

    above, ties = _over_chunks(states, items, rivals).sum(0).astype(jnp.float32)
    return Ranked(above, ties, score, log_z)


def ranked_among(states: Array, items: Array, own: Array, candidates: Array) -> Ranked:
    """The same among candidates int32 [B, N]; those that are `own` itself are ties."""
    ids = jnp.concatenate([own[:, None], candidates], 1)
    scores = jnp.einsum("bw,bnw->bn", states, items[ids])
    score, others = scores[:, 0], scores[:, 1:]
    above = (others > score[:, None]).sum(-1).astype(jnp.float32)
    ties = (others == score[:, None]).sum(-1).astype(jnp.float32)
    return Ranked(above, ties, score, jax.nn.logsumexp(scores, -1))


def best(states: Array, items: Array, count: int) -> tuple[Array, Array]:
    """(scores, ids) [B, count] of the items with the highest scores, descending."""
    rows = len(states)
    start = jnp.full((rows, count), -jnp.inf), jnp.zeros((rows, count), jnp.int32)

    def step(kept: tuple, chunk: tuple) -> tuple:
        scores, ids = _scores(states, *chunk)
        scores = jnp.where(ids >= 0, scores, -jnp.inf)
        every = jnp.concatenate([kept[0], scores], 1)
        ids = jnp.concatenate([kept[1], jnp.broadcast_to(ids, scores.shape)], 1)
        scores, index = jax.lax.top_k(every, count)
        return (scores, jnp.take_along_axis(ids, index, 1)), None

    return jax.lax.scan(step, start, _chunks(items))[0]


def _chunks(items: Array) -> tuple[Array, Array]:
    """(rows [C, chunk, W], their ids [C, chunk], -1: none) of items [V, W]."""
    size, width = items.shape
    chunk = min(CHUNK, size)
    missing = -size % chunk
    ids = jnp.arange(size + missing, dtype=jnp.int32)
    ids = jnp.where(ids < size, ids, -1).reshape(-1, chunk)
    return jnp.pad(items, ((0, missing), (0, 0))).reshape(-1, chunk, width), ids


def _scores(states: Array, rows: Array, ids: Array) -> tuple[Array, Array]:
    return states @ rows.T, ids[None]


def _over_chunks(states: Array, items: Array, of_chunk: Callable) -> Array:
    """of_chunk(scores [B, chunk], ids [1, chunk]) of every chunk, stacked."""
    return jax.lax.map(lambda chunk: of_chunk(*_scores(states, *chunk)), _chunks(items))
