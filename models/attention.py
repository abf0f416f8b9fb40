"""Attention: projections around an algorithm, with or without a cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.algorithms import ALGORITHMS, has_globals
from triform.models.config import TransformerConfig
from triform.models.layers import dense
from triform.models.mask import Mask
from triform.models.positions import POSITIONS, Relative, rotate

Array = jax.Array


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, 3.2.2), grouped or not.

    Parameters: query, key, value kernels [D, H or K, E], out kernel [H, E, D]; and,
    where the algorithm has them and the mask has global tokens, query_global,
    key_global, value_global (Beltagy et al. 2020, 3.1).
    """

    config: TransformerConfig
    output: bool = True  # False: no out kernel, what the heads give stands side by side

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

        `relative` holds the rotation of x (and so of the new keys) and a bias over all
        keys that the queries may see; for self-attention only.

        With `cache` and `index` the queries see what the cache holds and the new keys
        and values, which go into it, from slot `index` on where it has slots; with
        `cache` and no source a KVCache is read as it is (cross-attention while
        decoding). `mask` describes all keys that the queries may see. Returns
        ([B, L, D], cache).
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        attend = ALGORITHMS[cfg.attention]
        rotation = None if relative is None else relative.rotation

        def project(y: Array, heads: int, name: str) -> Array:
            shape = heads, cfg.head_width()
            return dense(cfg, shape, name, bias=cfg.bias != "none")(y)

        def rotated(y: Array) -> Array:
            return y if rotation is None else rotate(y, rotation)

        options: dict[str, Any] = cfg.options() | {
            "scale": cfg.scale(),
            "bias": None if relative is None else relative.bias,
            "rng": self.make_rng("dropout") if self.has_rng("dropout") else None,
            "dropout": cfg.attention_dropout,
        }
        query = rotated(project(x, cfg.num_heads, "query"))
        score = POSITIONS[cfg.positions].score
        if relative is not None and score is not None:
            options["bias"] = score(cfg, query, mask)
        if source is None:
            out = attend(query, *cache.read(dtype), mask, **options)
        else:
            key = rotated(project(source, cfg.kv_heads(), "key"))
            value = project(source, cfg.kv_heads(), "value")
            if has_globals(attend) and mask.q_global is not None:
                options["of_globals"] = (
                    rotated(project(x, cfg.num_heads, "query_global")),
                    rotated(project(source, cfg.kv_heads(), "key_global")),
                    project(source, cfg.kv_heads(), "value_global"),
                )
            if cache is None:
                out = attend(query, key, value, mask, **options)
            else:
                out, cache = cache.attend(
                    attend, query, key, value, mask, index, **options
                )
        if not self.output:
            return out.reshape(*out.shape[:2], -1), cache
        output = dense(cfg, cfg.d_model, "out", bias=cfg.bias == "all", axes=2)
        return output(out), cache
