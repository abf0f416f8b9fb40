"""Small layers of the trunk: dense products, norms, dropout, and initialisers."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.matmul import dot_general

Array = jax.Array


def _xavier(config: TransformerConfig, name: str) -> nn.initializers.Initializer:
    return nn.initializers.xavier_uniform()


def _normal(config: TransformerConfig, name: str) -> nn.initializers.Initializer:
    # BERT (Devlin et al. 2019): a truncated normal of 0.02.
    return nn.initializers.truncated_normal(0.02)


def _depth(config: TransformerConfig, name: str) -> nn.initializers.Initializer:
    # GPT-2 (Radford et al. 2019, 2.3): what is added to the residual stream shrinks
    # with the number of times that something is added.
    residual = name in ("out", "down")
    return nn.initializers.normal(
        0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
    )


def _t5(config: TransformerConfig, name: str) -> nn.initializers.Initializer:
    # Mesh TensorFlow: by inputs; the query takes the factor that attention leaves out.
    scale = 1 / config.head_width() if name == "query" else 1.0
    return nn.initializers.variance_scaling(scale, "fan_in", "normal")


# name: fn(config, name of the kernel's module) -> initialiser
INITS = {"xavier": _xavier, "normal": _normal, "depth": _depth, "t5": _t5}


def dense(
    config: TransformerConfig,
    features: int | tuple[int, ...],
    name: str,
    *,
    bias: bool,
    axis: int | tuple[int, ...] = -1,
) -> nn.DenseGeneral:
    """A product over the axes `axis` with a kernel that the config initialises.

    The kernels of global tokens (`query_global`) are initialised as the others.
    """
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=INITS[config.init](config, name.removesuffix("_global")),
        dot_general=dot_general,
        name=name,
    )


def make_norm(config: TransformerConfig, name: str | None) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_eps, dtype=dtype, name=name)
    return nn.LayerNorm(
        epsilon=config.norm_eps, use_bias=config.bias == "all", dtype=dtype, name=name
    )


def dropout(module: nn.Module, x: Array, name: str | None = None) -> Array:
    """Dropout at the trunk's rate; on exactly when an rng named 'dropout' is given."""
    rate = module.config.dropout
    return nn.Dropout(rate, deterministic=not module.has_rng("dropout"), name=name)(x)
