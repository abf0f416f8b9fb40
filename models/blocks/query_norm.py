"""The block of SASRec's code (Kang & McAuley 2018): residuals of what is normalised."""

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


class QueryNormBlock(nn.Module):
    """q + attention(q, x) with q = norm(x), then z + feed_forward(z) with z = norm(y).

    Keys and values are those of x itself, attention has no kernel after its heads, and
    dropout is on its weights, not on what it gives; and inside the feed-forward network
    and after it. Cross-attention, if there is a memory, is between both: n +
    attention(n, memory). `norm_position` decides about the norm after all blocks only.
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
        query = make_norm(cfg, "self_attention_norm")(x)
        out, cache["self"] = self_attention(
            *(cfg, query, mask, relative, cache["self"], index),
            *(self.window, self.pattern),
            source=x,
            output=False,
        )
        x = query + out
        if self.cross:
            query = make_norm(cfg, "cross_attention_norm")(x)
            out, cache["cross"] = cross_attention(
                cfg, query, memory, memory_mask, cache["cross"]
            )
            x = query + out
        x = make_norm(cfg, "feed_forward_norm")(x)
        hidden = FeedForward(cfg, inner_dropout=True, name="feed_forward")(x)
        return x + dropout(self, hidden), cache
