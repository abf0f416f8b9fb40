"""Stack: the trunk of every family."""

from typing import Any

import jax
from flax import linen as nn

from triform.models.blocks import BLOCKS
from triform.models.cache import Cache
from triform.models.config import TransformerConfig
from triform.models.layers import dropout, make_norm
from triform.models.mask import Mask
from triform.models.positions import POSITIONS, Relative

Array = jax.Array

# Collections of variables and streams of rngs that modules inside a trunk may use. A
# scanned trunk stacks the former and splits the latter along the layers.
COLLECTIONS = ("params", "intermediates", "losses", "stats")
STREAMS = ("params", "dropout", "sample")
# trunk.remat_keeps -> what a block's forward pass stores.
POLICIES = {
    "nothing": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Cycle(nn.Module):
    """The consecutive blocks that differ, as one step of the scan over layers."""

    config: TransformerConfig
    cross: bool
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, caches, mask, memory, memory_mask, relative, index):
        """(x, caches of this cycle, ...) -> (x, caches)."""
        cfg, out = self.config, []
        for i in range(cfg.cycle()):
            block = self.block(cfg, self.cross, *cfg.limits_of(i), name=f"layer_{i}")
            x, cache = block(x, mask, memory, memory_mask, relative, caches[i], index)
            out.append(cache)
        return x, out


class Stack(nn.Module):
    """num_layers blocks: the trunk. Same interface looped, scanned, remat, cached.

    Parameters: layer_0 .. layer_{N-1} looped; layers/layer_0 .. with a leading axis of
    N / cycle scanned; relative_bias (relative positions); norm (pre-norm only).
    """

    config: TransformerConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Mask,
        *,
        memory: Array | None = None,
        memory_mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        """x [B, L, D] -> ([B, L, D], cache).

        With a cache, x holds the next L tokens of each row and `mask` their positions;
        they see the cache's filled slots and themselves. `memory` is then needed at the
        first call only.
        """
        cfg = self.config
        index, caches = None, [{"self": None, "cross": None}] * cfg.num_layers
        if cache is not None:
            index, caches = cache.index, cache.blocks
            slots = jax.lax.dynamic_update_slice(
                cache.positions, mask.q_positions, (0, index)
            )
            mask = mask.replace(
                kv_positions=slots, q_segments=None, kv_segments=None, aligned=False
            )
        relative = self.relative(mask)
        x = dropout(self, x)
        block = BLOCKS[cfg.block]
        if cfg.remat:
            block = nn.remat(
                block, prevent_cse=not cfg.scan_layers, policy=POLICIES[cfg.remat_keeps]
            )
        if cfg.scan_layers:
            scanned = nn.scan(
                Cycle,
                variable_axes=dict.fromkeys(COLLECTIONS, 0),
                split_rngs=dict.fromkeys(STREAMS, True),
                in_axes=(0, *(nn.broadcast,) * 5),
                length=cfg.num_layers // cfg.cycle(),
            )
            layers = scanned(cfg, self.cross, block, name="layers")
            rest = mask, memory, memory_mask, relative, index
            x, caches = layers(x, caches[: cfg.cycle()], *rest)
        else:
            out: list[Any] = []
            for i in range(cfg.num_layers):
                layer = block(cfg, self.cross, *cfg.limits_of(i), name=f"layer_{i}")
                x, layer_cache = layer(
                    x, mask, memory, memory_mask, relative, caches[i], index
                )
                out.append(layer_cache)
            caches = out
        if cfg.norm_position == "pre":
            x = make_norm(cfg, "norm")(x)
        if cache is None:
            return x, None
        index = index + mask.q_positions.shape[1]
        return x, cache.replace(blocks=caches, positions=slots, index=index)

    @nn.nowrap
    def relative(self, mask: Mask) -> Relative:
        """Rotation or bias of relative positions: the same for all blocks."""
        attend = POSITIONS[self.config.positions].attend
        return attend(self.config, mask) if attend else Relative()
