"""The block of Vaswani et al. 2017: sublayers one after another."""

from collections.abc import Callable

import jax
from flax import linen as nn

from triform.models.blocks.sublayers import Block
from triform.models.feed_forward import FeedForward
from triform.models.layers import dropout, make_norm

Array = jax.Array


class StandardBlock(Block):
    """Self-attention, cross-attention if there is a memory, feed-forward.

    Post-norm is norm(x + f(x)) (Vaswani et al. 2017), pre-norm x + f(norm(x)).
    """

    @nn.nowrap
    def wired(
        self, x: Array, own: Callable[..., Array], other: Callable[[Array], Array]
    ) -> Array:
        """x, with what every sublayer adds."""
        cfg = self.config

        def sublayer(name: str, x: Array, fn: Callable[[Array], Array]) -> Array:
            norm = make_norm(cfg, f"{name}_norm")
            if cfg.norm_position == "pre":
                return x + dropout(self, fn(norm(x)))
            return norm(x + dropout(self, fn(x)))

        x = sublayer("self_attention", x, own)
        if self.cross:
            x = sublayer("cross_attention", x, other)
        return sublayer("feed_forward", x, FeedForward(cfg, name="feed_forward"))
