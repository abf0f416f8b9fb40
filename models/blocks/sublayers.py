"""What every block is made of: attention to itself and to a memory, with caches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.attention import Attention
from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.patterns import pattern_of
from triform.models.positions import Relative

Array = jax.Array


class Block(nn.Module):
    """Base: a kind of block says in `wired` how its sublayers are connected."""

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
        if self.window:
            mask = mask.replace(window=min(self.window, mask.window or self.window))
        if self.pattern != "none":
            mask = mask.replace(pattern=pattern_of(self.pattern))
        # The memory's keys and values fill the cache at the first call and are then
        # only read.
        start = None if memory is None else jnp.zeros((), jnp.int32)

        def own(y: Array, source: Array | None = None, output: bool = True) -> Array:
            attention = Attention(cfg, output, name="self_attention")
            source = y if source is None else source
            y, cache["self"] = attention(
                y, source, mask, relative=relative, cache=cache["self"], index=index
            )
            return y

        def other(y: Array) -> Array:
            attention = Attention(cfg, name="cross_attention")
            y, cache["cross"] = attention(
                y, memory, memory_mask, cache=cache["cross"], index=start
            )
            return y

        return self.wired(x, own, other), cache

    @nn.nowrap
    def wired(
        self, x: Array, own: Callable[..., Array], other: Callable[[Array], Array]
    ) -> Array:
        """[B, L, D] of x [B, L, D]. Called within `__call__`: it may have parameters.

        own(queries, source=None, output=True): self-attention within window and
        pattern; keys and values are made of `source`, if given; without `output` there
        is no kernel after the heads. other(queries): attention to the memory, if
        `cross`.
        """
        raise NotImplementedError
