"""Token tables."""

import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig


def embedding(trunk: TransformerConfig, size: int, stddev: float = 0.02) -> nn.Embed:
    """A table [size, D] with normal entries."""
    init = nn.initializers.normal(stddev)
    dtype = jnp.dtype(trunk.dtype)
    return nn.Embed(size, trunk.d_model, dtype=dtype, embedding_init=init)
