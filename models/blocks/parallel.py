"""Attention and feed-forward in parallel (Wang & Komatsuzaki 2021; PaLM, 2)."""

from collections.abc import Callable

import jax
from flax import linen as nn

from triform.models.blocks.sublayers import Block
from triform.models.feed_forward import FeedForward
from triform.models.layers import dropout, make_norm

Array = jax.Array


class ParallelBlock(Block):
    """x + attention(norm(x)) + feed_forward(norm(x)), with one norm.

    Cross-attention, if there is a memory, is a third summand. Post-norm is the norm of
    the sum over x itself.
    """

    @nn.nowrap
    def wired(
        self, x: Array, own: Callable[..., Array], other: Callable[[Array], Array]
    ) -> Array:
        """x and the sum of what the sublayers add."""
        cfg = self.config
        norm = make_norm(cfg, "norm")
        pre = cfg.norm_position == "pre"
        y = norm(x) if pre else x
        total = dropout(self, own(y))
        if self.cross:
            total += dropout(self, other(y))
        total += dropout(self, FeedForward(cfg, name="feed_forward")(y))
        return x + total if pre else norm(x + total)
