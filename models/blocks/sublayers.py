"""Self-attention and cross-attention as sublayers of every block.

Called within a block's compact method, which then owns their parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp

from triform.models.attention import Attention
from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.patterns import pattern_of
from triform.models.positions import Relative

Array = jax.Array


def self_attention(
    config: TransformerConfig,
    x: Array,
    mask: Mask,
    relative: Relative,
    cache: Any,
    index: Array | None,
    window: int,
    pattern: str,
    source: Array | None = None,
    output: bool = True,
) -> tuple[Array, Any]:
    """([B, L, D], the layer's own cache) of x [B, L, D], within window and pattern.

    `source` [B, L, D]: what keys and values are made of, if not of x. Without `output`
    there is no kernel after the heads.
    """
    if window:
        mask = mask.replace(window=min(window, mask.window or window))
    if pattern != "none":
        mask = mask.replace(pattern=pattern_of(pattern))
    attention = Attention(config, output, name="self_attention")
    source = x if source is None else source
    return attention(x, source, mask, relative=relative, cache=cache, index=index)


def cross_attention(
    config: TransformerConfig,
    x: Array,
    memory: Array | None,
    mask: Mask,
    cache: Any,
) -> tuple[Array, Any]:
    """([B, L, D], cache of the memory) of queries x [B, L, D].

    The memory's keys and values fill the cache at the first call and are then only
    read, with memory=None.
    """
    start = None if memory is None else jnp.zeros((), jnp.int32)
    attention = Attention(config, name="cross_attention")
    return attention(x, memory, mask, cache=cache, index=start)
