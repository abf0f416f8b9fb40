"""Blocks: wirings of sublayers, in a literal table.

    Block(config, cross, window, pattern)(x [B, L, D], mask, memory [B, M, D] or None,
        memory_mask, relative, cache, index) -> (x, cache)

`cross`: attends to a memory, too. `window` and `pattern` are those of the layer.
`cache` is {"self": ..., "cross": ...} of models/cache.py, both None in a full pass;
`index` is the first slot that the new tokens take.

To add one: a file here, with a subclass of `sublayers.Block`, and a row in BLOCKS;
trunk.block names it. Any module that is called like this will do.
"""

from triform.models.blocks.parallel import ParallelBlock
from triform.models.blocks.query_norm import QueryNormBlock
from triform.models.blocks.standard import StandardBlock

BLOCKS = {
    "standard": StandardBlock,
    "parallel": ParallelBlock,
    "query_norm": QueryNormBlock,
}
