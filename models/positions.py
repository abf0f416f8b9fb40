"""Position encodings: sinusoidal and learned tables, rotary, and relative ones.

To add one: its functions here and a row in POSITIONS; trunk.positions names it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from triform.models.config import TransformerConfig
from triform.models.mask import Mask

Array = jax.Array

# Raffel et al. 2020, 2.1; the same in every published T5.
RELATIVE_BUCKETS = 32
RELATIVE_MAX_DISTANCE = 128


def sinusoidal_table(length: int, width: int) -> np.ndarray:
    """float32 [length, width]: sines in the first half, cosines in the second.

    Vaswani et al. 2017, 3.5, with the channels in halves rather than interleaved: a
    fixed permutation that the next matrix absorbs.
    """
    half = width // 2
    rates = 10_000.0 ** -(np.arange(half) / half)
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)


class PositionEmbedding(nn.Module):
    """Adds the encoding of absolute positions to embeddings."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, positions: Array) -> Array:
        """x [B, L, D] plus the encoding of positions int32 [B or 1, L]."""
        cfg = self.config
        embed = POSITIONS[cfg.positions].embed
        if embed is None:
            return x
        if x.shape[1] > cfg.max_len:
            raise ValueError(
                f"a sequence of {x.shape[1]} tokens exceeds model.trunk.max_len="
                f"{cfg.max_len}; raise it or shorten the data"
            )
        # Empty slots have negative positions; their values are never seen.
        positions = jnp.clip(positions, 0, cfg.max_len - 1)
        return x + embed(cfg, positions, x.dtype)


def _sinusoidal(config: TransformerConfig, positions: Array, dtype: jnp.dtype) -> Array:
    table = jnp.asarray(sinusoidal_table(config.max_len, config.d_model))
    return jnp.take(table, positions, axis=0).astype(dtype)


def _learned(config: TransformerConfig, positions: Array, dtype: jnp.dtype) -> Array:
    init = nn.initializers.normal(0.02)
    table = nn.Embed(
        config.max_len, config.d_model, dtype=dtype, embedding_init=init, name="table"
    )
    return table(positions)


@struct.dataclass
class Relative:
    """Positions for self-attention: the same for all blocks of a stack."""

    bias: Array | None = None  # [B or 1, H, L, S], added to the scores
    # Cosines and sines, each float32 [B or 1, L, 1, E / 2], of queries and new keys.
    rotation: tuple[Array, Array] | None = None


def rotary_frequencies(config: TransformerConfig) -> tuple[np.ndarray, float]:
    """(float64 [E / 2] radians a position, factor on cosines and sines).

    Su et al. 2021, 3.2.2; for the scalings see RopeConfig.
    """
    rope, half = config.rope, config.head_width() // 2
    rates = rope.base ** -(np.arange(half) / half)
    if rope.scaling == "none":
        return rates, 1.0
    if rope.scaling == "linear":
        return rates / rope.factor, 1.0
    if rope.scaling == "llama3":
        turns = rope.length * rates / (2 * math.pi)
        kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        return (1 - kept) * rates / rope.factor + kept * rates, 1.0

    def channel(turns: float) -> float:
        """The channel whose frequency turns so often over the original length."""
        period = rope.length / (turns * 2 * math.pi)
        return half * math.log(period) / math.log(rope.base)

    first = max(math.floor(channel(rope.fast)), 0)
    last = min(math.ceil(channel(rope.slow)), 2 * half - 1)
    ramp = (np.arange(half) - first) / max(last - first, 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    mixed = (1 - kept) * rates / rope.factor + kept * rates
    return mixed, rope.attention or 0.1 * math.log(rope.factor) + 1


def rotation(
    config: TransformerConfig, positions: Array, stored: str = "float32"
) -> tuple[Array, Array]:
    """Cosines and sines float32 [B, L, 1, E / 2] of positions int32 [B, L].

    Frequencies are rounded to the dtype `stored`.
    """
    rates, factor = rotary_frequencies(config)
    rates = rates.astype(np.float32).astype(jnp.dtype(stored)).astype(np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * rates
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates the channel pairs (i, i + E / 2) of x [B, L, H, E]; the dtype stays.

    The pairs are halves, as in GPT-NeoX and Llama's published weights.
    """
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return out.astype(x.dtype)


def relative_bucket(distance: Array, bidirectional: bool) -> Array:
    """T5's bucket, int32 of the same shape, of key position minus query position.

    Half of the buckets hold one distance each, the others grow logarithmically up to
    RELATIVE_MAX_DISTANCE; bidirectional ones split into before and after.
    """
    buckets, start = RELATIVE_BUCKETS, 0
    if bidirectional:
        buckets //= 2
        start = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # Boundaries by table: float32 logarithms would round some of them the wrong way.
    steps = np.arange(exact, RELATIVE_MAX_DISTANCE + 1)
    spread = math.log(RELATIVE_MAX_DISTANCE / exact)
    grown = np.log(steps.astype(np.float32) / exact) / spread * (buckets - exact)
    far = np.minimum(exact + grown.astype(np.int32), buckets - 1)
    table = np.concatenate([np.arange(exact), far]).astype(np.int32)
    return start + jnp.take(table, jnp.minimum(distance, RELATIVE_MAX_DISTANCE))


class RelativeBias(nn.Module):
    """A learned bias a head and bucket of distances (Raffel et al. 2020, 2.1)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, q: Array, kv: Array, bidirectional: bool) -> Array:
        """float32 [B, H, L, S] of positions q [B, L] and kv [B, S]."""
        heads = self.config.num_heads
        init = nn.initializers.normal(self.config.d_model**-0.5)
        table = self.param("embedding", init, (RELATIVE_BUCKETS, heads))
        which = relative_bucket(kv[:, None, :] - q[:, :, None], bidirectional)
        return jnp.moveaxis(jnp.take(table, which, axis=0), -1, 1)


class RelativeKeys(nn.Module):
    """Scores of queries with a learned vector a head and distance.

    Shaw et al. 2018, 3.2, on keys, each layer and head with its own (Huang et al. 2018,
    3.4). Distances from max_len on share the vector of max_len - 1. Parameters:
    embedding [max_len or, of both directions, 2 max_len - 1, H, E].
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, query: Array, mask: Mask) -> Array:
        """float32 [B, H, L, S] of query [B, L, H, E] and all keys of the mask."""
        config, farthest = self.config, self.config.max_len - 1
        width = config.head_width()
        count = farthest + 1 + (0 if mask.causal else farthest)
        init = nn.initializers.normal(width**-0.5)
        table = self.param("embedding", init, (count, config.num_heads, width))
        length, causal = query.shape[1], mask.causal
        # Distance to a key, from the farthest before to the farthest after.
        own = mask.aligned and mask.kv_positions.shape[1] == length
        if own:
            distances = np.arange(1 - length, 1 if causal else length)
            which = np.clip(distances + farthest, 0, count - 1)
            table = jnp.take(table, which, axis=0)
        scores = jnp.einsum(
            "blhe,rhe->bhlr",
            query * config.scale(),
            table.astype(query.dtype),
            preferred_element_type=jnp.float32,
        )
        if own:
            return skewed(scores, causal)
        distance = mask.kv_positions[:, None, :] - mask.q_positions[:, :, None]
        which = jnp.clip(distance + farthest, 0, count - 1)[:, None]
        shape = *scores.shape[:3], which.shape[-1]
        return jnp.take_along_axis(scores, jnp.broadcast_to(which, shape), -1)


def skewed(scores: Array, causal: bool) -> Array:
    """[B, H, L, L] by key of scores [B, H, L, R] by distance, ascending.

    R is L, up to distance 0, where keys after a query are not seen (what stands there
    means nothing), else 2 L - 1. Nothing is gathered: rows of another length begin at
    other places (Huang et al. 2018, 3.4.1).
    """
    *rows, length, count = scores.shape
    if causal:
        padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
        return padded.reshape(*rows, length + 1, length)[..., 1:, :]
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, 1)])
    flat = padded.reshape(*rows, length * (count + 1))[..., : length * count]
    return flat.reshape(*rows, length, count)[..., length - 1 :]


def _relative_keys(config: TransformerConfig, query: Array, mask: Mask) -> Array:
    return RelativeKeys(config, name="relative_keys")(query, mask)


def _rotary(config: TransformerConfig, mask: Mask, stored: str = "float32") -> Relative:
    return Relative(rotation=rotation(config, mask.q_positions, stored))


def _relative(config: TransformerConfig, mask: Mask) -> Relative:
    bias = RelativeBias(config, name="relative_bias")
    return Relative(
        bias=bias(mask.q_positions, mask.kv_positions, bidirectional=not mask.causal)
    )


class Scheme(NamedTuple):
    """How positions enter a model; parts that are None do nothing."""

    # fn(config, positions int32 [B or 1, L], dtype) -> [B or 1, L, D], added to the
    # embeddings. Called within a module: it may have parameters.
    embed: Callable[[TransformerConfig, Array, jnp.dtype], Array] | None = None
    # fn(config, mask) -> Relative, once for all blocks of a stack. Likewise.
    attend: Callable[[TransformerConfig, Mask], Relative] | None = None
    # fn(config, query [B, L, H, E], mask) -> [B, H, L, S], added to the scores: in
    # every layer with parameters of its own.
    score: Callable[[TransformerConfig, Array, Mask], Array] | None = None
    # `attend` or `score` gives a bias: keys must stay in their columns.
    biased: bool = False


# A name in trunk.positions -> scheme.
POSITIONS = {
    "sinusoidal": Scheme(embed=_sinusoidal),
    "learned": Scheme(embed=_learned),
    "rotary": Scheme(attend=_rotary),
    # Of weights that were trained with frequencies in this dtype (ESM-2).
    "rotary_float16": Scheme(attend=functools.partial(_rotary, stored="float16")),
    "rotary_bfloat16": Scheme(attend=functools.partial(_rotary, stored="bfloat16")),
    "relative": Scheme(attend=_relative, biased=True),
    "relative_keys": Scheme(score=_relative_keys, biased=True),
    "learned_relative_keys": Scheme(embed=_learned, score=_relative_keys, biased=True),
    "none": Scheme(),
}
