"""Token tables and the logits over them: what every family with tokens shares."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.matmul import dot_general

Array = jax.Array


def embedding(trunk: TransformerConfig, size: int, stddev: float = 0.02) -> nn.Embed:
    """A table [size, D] with normal entries."""
    init = nn.initializers.normal(stddev)
    dtype = jnp.dtype(trunk.dtype)
    return nn.Embed(size, trunk.d_model, dtype=dtype, embedding_init=init)


def head(
    trunk: TransformerConfig, size: int, bias: bool = False, name: str | None = None
) -> nn.Dense:
    """[..., D] -> float32 logits [..., size].

    They are accumulated in float32: in bfloat16 the best ones would tie.
    """
    return nn.Dense(
        size,
        use_bias=bias,
        dtype=jnp.dtype(trunk.dtype),
        kernel_init=nn.initializers.normal(0.02),
        dot_general=functools.partial(dot_general, preferred_element_type=jnp.float32),
        name=name,
    )


def tied_logits(x: Array, table: nn.Embed) -> Array:
    """float32 [B, L, V]: x [B, L, D] times the transposed table."""
    weights = table.embedding.astype(x.dtype)
    axes = ((x.ndim - 1,), (0,)), ((), ())
    return dot_general(x, weights.T, axes, preferred_element_type=jnp.float32)
