"""Attention: projections around an algorithm, with or without a cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.algorithms import ALGORITHMS, has_globals
from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.matmul import dot_general
from triform.models.positions import Relative, rotate

Array = jax.Array


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

    Parameters: query, key, value kernels [D, H or K, E], out kernel [H, E, D]; and,
    where the algorithm has them and the mask has global tokens, query_global,
    key_global, value_global (Beltagy et al. 2020, 3.1).
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
        cache: Any = None,
        index: Array | None = None,
    ) -> tuple[Array, Any]:
        """Queries from x [B, L, D], keys and values from source [B, S, D].

        `relative` holds what self-attention is told of positions: of x, and so of the
        new keys, and a bias over all keys that are looked at.

        With `cache` and `index` the queries see what the cache holds and the new keys
        and values, which go into it, from slot `index` on where it has slots; with
        `cache` and no source a KVCache is read as it is (cross-attention while
        decoding). `mask` describes the keys that are looked at. Returns ([B, L, D],
        cache).
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        attend = cfg.attention
        if not callable(attend):
            attend = ALGORITHMS[attend]
        turn = None if relative is None else relative.rotation

        def project(y: Array, heads: int, name: str) -> Array:
            return nn.DenseGeneral(
                (heads, cfg.head_width()),
                use_bias=cfg.bias != "none",
                dtype=dtype,
                kernel_init=kernel_init(cfg, name.partition("_")[0]),
                dot_general=dot_general,
                name=name,
            )(y)

        def turned(y: Array) -> Array:
            return y if turn is None else rotate(y, turn)

        options: dict[str, Any] = cfg.options() | {
            "scale": cfg.scale(),
            "bias": None if relative is None else relative.bias,
            "rng": self.make_rng("dropout") if self.has_rng("dropout") else None,
            "dropout": cfg.attention_dropout,
        }
        query = turned(project(x, cfg.num_heads, "query"))
        if source is None:
            seen = cache.key.astype(dtype), cache.value.astype(dtype)
            out = attend(query, *seen, mask, **options)
        else:
            key = turned(project(source, cfg.kv_heads(), "key"))
            value = project(source, cfg.kv_heads(), "value")
            if has_globals(attend) and mask.q_global is not None:
                options["of_globals"] = (
                    turned(project(x, cfg.num_heads, "query_global")),
                    turned(project(source, cfg.kv_heads(), "key_global")),
                    project(source, cfg.kv_heads(), "value_global"),
                )
            if cache is None:
                out = attend(query, key, value, mask, **options)
            else:
                out, cache = cache.attend(
                    attend, query, key, value, mask, index, **options
                )
        out = nn.DenseGeneral(
            cfg.d_model,
            axis=(-2, -1),
            use_bias=cfg.bias == "all",
            dtype=dtype,
            kernel_init=kernel_init(cfg, "out"),
            dot_general=dot_general,
            name="out",
        )(out)
        return out, cache
