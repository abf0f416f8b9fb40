"""Scaled dot-product attention (Vaswani et al. 2017, 3.2.1): the reference."""

import jax
import jax.numpy as jnp

from triform.models.mask import Mask

Array = jax.Array


def dot(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    bias: Array | None = None,
    rng: Array | None = None,
    dropout: float = 0.0,
) -> Array:
    """softmax(scale * q k^T + bias) v over the keys that `mask` allows.

    q [B, L, H, E], k and v [B, S, K, E] with K dividing H, bias [B or 1, H, L, S],
    `rng` switches dropout of the weights on. Scores and softmax are float32 whatever
    the dtype of q. Stores [B, H, L, S]. Returns [B, L, H, E] in the dtype of q.
    """
    batch, queries, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(batch, queries, k.shape[2], groups, width)
    scores = jnp.einsum(
        "blkge,bske->bkgls", q * scale, k, preferred_element_type=jnp.float32
    )
    if bias is not None:
        bias = bias.reshape(bias.shape[0], k.shape[2], groups, *bias.shape[2:])
        scores += bias.astype(jnp.float32)
    allowed = mask.allowed()[:, None, None]
    # One finite fill, applied once: sums of two minus infinities overflow in bfloat16.
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(allowed, jnp.exp(scores - peak), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    if rng is not None and dropout > 0:
        keep = jax.random.bernoulli(rng, 1 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout), 0.0)
    out = jnp.einsum("bkgls,bske->blkge", weights.astype(v.dtype), v)
    return out.reshape(batch, queries, heads, width)
