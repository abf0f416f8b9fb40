"""Absolute position encodings: sinusoidal and learned."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from triform.models.config import TransformerConfig

Array = jax.Array


def sinusoidal_table(length: int, width: int) -> np.ndarray:
    """float32 [length, width]: sines in the first half, cosines in the second.

    Vaswani et al. 2017, 3.5, with the channels in the order of tensor2tensor (halves
    rather than interleaved: a fixed permutation that the next matrix absorbs).
    """
    half = width // 2
    # tensor2tensor's spacing: wavelengths from 2 pi to 10000 * 2 pi, both included.
    rates = 10_000.0 ** -(np.arange(half) / max(half - 1, 1))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)


class PositionEmbedding(nn.Module):
    """Adds the encoding of absolute positions to embeddings."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, positions: Array) -> Array:
        """x [B, L, D] plus the encoding of positions int32 [B, L]."""
        cfg = self.config
        if x.shape[1] > cfg.max_len and cfg.positions != "none":
            raise ValueError(
                f"a sequence of {x.shape[1]} tokens exceeds model.trunk.max_len="
                f"{cfg.max_len}; raise it or shorten the data"
            )
        # Empty slots have negative positions; their values are never seen.
        positions = jnp.clip(positions, 0, cfg.max_len - 1)
        if cfg.positions == "sinusoidal":
            table = jnp.asarray(sinusoidal_table(cfg.max_len, cfg.d_model))
            return x + jnp.take(table, positions, axis=0).astype(x.dtype)
        if cfg.positions == "learned":
            table = nn.Embed(
                cfg.max_len,
                cfg.d_model,
                dtype=x.dtype,
                embedding_init=nn.initializers.normal(0.02),
                name="table",
            )
            return x + table(positions)
        return x
