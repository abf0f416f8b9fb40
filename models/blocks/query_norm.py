"""The block of SASRec's code (Kang & McAuley 2018): residuals of what is normalised."""

from collections.abc import Callable

import jax
from flax import linen as nn

from triform.models.blocks.sublayers import Block
from triform.models.feed_forward import FeedForward
from triform.models.layers import dropout, make_norm

Array = jax.Array


class QueryNormBlock(Block):
    """q + attention(q, x) with q = norm(x), then z + feed_forward(z) with z = norm(y).

    Keys and values are those of x itself, attention has no kernel after its heads, and
    dropout is on its weights, not on what it gives; and inside the feed-forward network
    and after it. Cross-attention, if there is a memory, is between both: n +
    attention(n, memory). `norm_position` decides about the norm after all blocks only.
    """

    @nn.nowrap
    def wired(
        self, x: Array, own: Callable[..., Array], other: Callable[[Array], Array]
    ) -> Array:
        """What is normalised, with what every sublayer adds."""
        cfg = self.config
        query = make_norm(cfg, "self_attention_norm")(x)
        x = query + own(query, source=x, output=False)
        if self.cross:
            query = make_norm(cfg, "cross_attention_norm")(x)
            x = query + other(query)
        x = make_norm(cfg, "feed_forward_norm")(x)
        hidden = FeedForward(cfg, inner_dropout=True, name="feed_forward")(x)
        return x + dropout(self, hidden)
