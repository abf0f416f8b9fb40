"""Attention: projections around an algorithm, and the key/value cache."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from triform.models.algorithms import ALGORITHMS
from triform.models.config import TransformerConfig
from triform.models.mask import Mask

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


def kernel_init(config: TransformerConfig) -> nn.initializers.Initializer:
    """Xavier uniform times sqrt(init_scale); every kernel of the trunk uses it."""
    return nn.initializers.variance_scaling(config.init_scale, "fan_avg", "uniform")


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
        cache: KVCache | None = None,
        index: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Queries from x [B, L, D], keys and values from source [B, S, D].

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
                use_bias=cfg.use_bias,
                dtype=dtype,
                kernel_init=kernel_init(cfg),
                name=name,
            )

        query = project(cfg.num_heads, "query")(x)
        if source is not None:
            key = project(cfg.kv_heads(), "key")(source)
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
            rng=self.make_rng("dropout") if train else None,
            dropout=cfg.attention_dropout,
        )
        out = nn.DenseGeneral(
            cfg.d_model,
            axis=(-2, -1),
            use_bias=cfg.use_bias,
            dtype=dtype,
            kernel_init=kernel_init(cfg),
            name="out",
        )(out)
        return out, cache
