"""The block of Vaswani et al. 2017: sublayers one after another."""

from typing import Any

import jax
from flax import linen as nn

from triform.models.blocks.sublayers import cross_attention, self_attention
from triform.models.config import TransformerConfig
from triform.models.feed_forward import FeedForward
from triform.models.layers import dropout, make_norm
from triform.models.mask import Mask
from triform.models.positions import Relative

Array = jax.Array


class StandardBlock(nn.Module):
    """Self-attention, cross-attention if there is a memory, feed-forward.

    Post-norm is norm(x + f(x)) (Vaswani et al. 2017), pre-norm x + f(norm(x)).
    """

    config: TransformerConfig
    cross: bool = False
    window: int = 0
    pattern: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Mask,
        memory: Array | None,
        memory_mask: Mask | None,
        relative: Relative,
        cache: dict[str, Any],
        index: Array | None,
    ) -> tuple[Array, dict[str, Any]]:
        """x [B, L, D], memory [B, M, D] -> (x, cache)."""
        cfg, cache = self.config, dict(cache)

        def sublayer(name: str, x: Array, fn) -> Array:
            norm = make_norm(cfg, f"{name}_norm")
            if cfg.norm_position == "pre":
                return x + dropout(self, fn(norm(x)))
            return norm(x + dropout(self, fn(x)))

        def own(y: Array) -> Array:
            limits = self.window, self.pattern
            y, cache["self"] = self_attention(
                cfg, y, mask, relative, cache["self"], index, *limits
            )
            return y

        def other(y: Array) -> Array:
            y, cache["cross"] = cross_attention(
                cfg, y, memory, memory_mask, cache["cross"]
            )
            return y

        x = sublayer("self_attention", x, own)
        if self.cross:
            x = sublayer("cross_attention", x, other)
        x = sublayer("feed_forward", x, FeedForward(cfg, name="feed_forward"))
        return x, cache
