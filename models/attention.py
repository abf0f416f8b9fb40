"""Attention: projections around an algorithm, and the key/value cache."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from triform.models.algorithms import ALGORITHMS
from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.positions import Relative, rotate

Array = jax.Array


@struct.dataclass
class KVCache:
    """Keys and values [B, S, K, E] of one attention layer; [N, B, S, K, E] scanned."""

    key: Array
    value: Array

    def write(self, key: Array, value: Array, index: Array) -> "KVCache":
        """Puts key and value [B, l, K, E] into the slots index .. index + l - 1."""
        start = (0, index, 0, 0)
        return KVCache(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(
                self.value, value.astype(self.value.dtype), start
            ),
        )


def _xavier(config: TransformerConfig, part: str) -> nn.initializers.Initializer:
    return nn.initializers.xavier_uniform()


def _normal(config: TransformerConfig, part: str) -> nn.initializers.Initializer:
    # BERT (Devlin et al. 2019): a truncated normal of 0.02.
    return nn.initializers.truncated_normal(0.02)


def _depth(config: TransformerConfig, part: str) -> nn.initializers.Initializer:
    # GPT-2 (Radford et al. 2019, 2.3): what is added to the residual stream shrinks
    # with the number of times that something is added.
    residual = part in ("out", "down")
    return nn.initializers.normal(
        0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
    )


def _t5(config: TransformerConfig, part: str) -> nn.initializers.Initializer:
    # Mesh TensorFlow: by inputs; the query takes the factor that attention leaves out.
    scale = 1 / config.head_width() if part == "query" else 1.0
    return nn.initializers.variance_scaling(scale, "fan_in", "normal")


# name: fn(config, part) -> initialiser; part is the name of the kernel's module
INITS = {"xavier": _xavier, "normal": _normal, "depth": _depth, "t5": _t5}


def kernel_init(config: TransformerConfig, part: str) -> nn.initializers.Initializer:
    """The initialiser of the kernel of query, key, value, out, up, gate or down."""
    return INITS[config.init](config, part)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, 3.2.2), grouped or not.

    Parameters: query, key, value kernels [D, H or K, E], out kernel [H, E, D].
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        source: Array | None,
        mask: Mask,
        *,
        relative: Relative | None = None,
        cache: KVCache | None = None,
        index: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Queries from x [B, L, D], keys and values from source [B, S, D].

        `relative` holds what self-attention is told of positions: of x, and so of the
        new keys, and a bias over all keys that are looked at.

        With `cache` and `index` the new keys and values go into the cache's slots from
        `index` on and the queries see the whole cache; with `cache` and no source the
        cache is read as it is (cross-attention while decoding). `mask` describes the
        keys that are looked at. Returns ([B, L, D], cache).
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)

        def project(heads: int, name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                (heads, cfg.head_width()),
                use_bias=cfg.bias != "none",
                dtype=dtype,
                kernel_init=kernel_init(cfg, name),
                name=name,
            )

        relative = relative or Relative()
        turn = relative.rotation
        query = project(cfg.num_heads, "query")(x)
        if turn is not None:
            query = rotate(query, turn)
        if source is not None:
            key = project(cfg.kv_heads(), "key")(source)
            if turn is not None:
                key = rotate(key, turn)
            value = project(cfg.kv_heads(), "value")(source)
            if cache is not None:
                cache = cache.write(key, value, index)
                key, value = cache.key, cache.value
        else:
            key, value = cache.key, cache.value

        attend = cfg.attention
        if not callable(attend):
            attend = ALGORITHMS[attend]
        train = cfg.attention_dropout > 0 and self.has_rng("dropout")
        out = attend(
            query,
            key.astype(dtype),
            value.astype(dtype),
            mask,
            scale=cfg.scale(),
            bias=relative.bias,
            rng=self.make_rng("dropout") if train else None,
            dropout=cfg.attention_dropout,
        )
        out = nn.DenseGeneral(
            cfg.d_model,
            axis=(-2, -1),
            use_bias=cfg.bias == "all",
            dtype=dtype,
            kernel_init=kernel_init(cfg, "out"),
            name="out",
        )(out)
        return out, cache
