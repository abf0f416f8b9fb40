"""The position-wise feed-forward network, and its table of activations."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.layers import dense, dropout

Array = jax.Array


def gelu(x: Array) -> Array:
    """Exact (Hendrycks & Gimpel 2016).

    In float32 by erf, for which XLA has one formula: nn.gelu takes erfc, of which it
    computes two and selects one. With fewer bits 1 + erf would be too coarse.
    """
    if x.dtype != jnp.float32:
        return nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


# name: (activation, gated). Gated units: Shazeer 2020, "GLU Variants".
FFNS = {
    "relu": (nn.relu, False),
    "silu": (nn.silu, False),
    "gelu": (gelu, False),
    "gelu_tanh": (functools.partial(nn.gelu, approximate=True), False),
    "geglu": (functools.partial(nn.gelu, approximate=True), True),
    "swiglu": (nn.silu, True),
}


class FeedForward(nn.Module):
    """Position-wise feed-forward network, gated if the config's `ffn` is."""

    config: TransformerConfig
    inner_dropout: bool = False  # also after the activation

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        cfg = self.config
        activation, gated = FFNS[cfg.ffn]
        bias = cfg.bias == "all"
        hidden = dense(cfg, cfg.d_ff, "up", bias=bias)(x)
        if gated:
            hidden = activation(dense(cfg, cfg.d_ff, "gate", bias=bias)(x)) * hidden
        else:
            hidden = activation(hidden)
        if self.inner_dropout:
            hidden = dropout(self, hidden)
        return dense(cfg, cfg.d_model, "down", bias=bias)(hidden)
