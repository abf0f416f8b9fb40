"""Attention and feed-forward in parallel (Wang & Komatsuzaki 2021; PaLM, 2)."""

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


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + feed_forward(norm(x)), with one norm.

    Cross-attention, if there is a memory, is a third summand. Post-norm is the norm of
    the sum over x itself.
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
        norm = make_norm(cfg, "norm")
        pre = cfg.norm_position == "pre"
        y = norm(x) if pre else x
        out, cache["self"] = self_attention(
            *(cfg, y, mask, relative, cache["self"], index), self.window, self.pattern
        )
        total = dropout(self, out)
        if self.cross:
            out, cache["cross"] = cross_attention(
                cfg, y, memory, memory_mask, cache["cross"]
            )
            total += dropout(self, out)
        total += dropout(self, FeedForward(cfg, name="feed_forward")(y))
        return x + total if pre else norm(x + total), cache
