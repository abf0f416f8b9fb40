"""Small layers of the trunk: dense products, norms, dropout, and initialisers."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.matmul import add_bias, dot_general

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


class Dense(nn.Module):
    """x [..., *inputs] times kernel [*inputs, *features], plus bias [*features].

    `inputs` are the last `axes` axes of x. The kernel is initialised as the matrix that
    it stands for.
    """

    features: tuple[int, ...]
    axes: int
    use_bias: bool
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., *inputs] -> [..., *features]."""
        shape = (*x.shape[-self.axes :], *self.features)

        def init(rng: Array, shape: tuple[int, ...]) -> Array:
            matrix = math.prod(shape[: self.axes]), math.prod(self.features)
            return self.kernel_init(rng, matrix, jnp.float32).reshape(shape)

        kernel = self.param("kernel", init, shape).astype(self.dtype)
        last = tuple(range(x.ndim - self.axes, x.ndim))
        first = tuple(range(self.axes))
        x = dot_general(x.astype(self.dtype), kernel, ((last, first), ((), ())))
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return add_bias(x, bias.astype(self.dtype))


def dense(
    config: TransformerConfig,
    features: int | tuple[int, ...],
    name: str,
    *,
    bias: bool,
    axes: int = 1,
) -> Dense:
    """A product over the last axes, with a kernel that the config initialises.

    The kernels of global tokens (`query_global`) are initialised as the others.
    """
    return Dense(
        features if isinstance(features, tuple) else (features,),
        axes,
        bias,
        jnp.dtype(config.dtype),
        INITS[config.init](config, name.removesuffix("_global")),
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
