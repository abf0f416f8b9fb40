"""Parameters (or other variables) of a looped trunk as a scanned one's, and back."""

from typing import Any

import jax
import jax.numpy as jnp


def stacked_layers(tree: Any, cycle: int, xp: Any = jnp) -> Any:
    """Variables of looped trunks as scanned ones; any tree that holds such.

    Layer i becomes element i // cycle of layers/layer_(i mod cycle); `cycle` is that of
    the trunk. `xp` is the module that stacks: numpy or jax.numpy.
    """
    if not isinstance(tree, dict) or "layers" in tree:
        return tree
    layers = [k for k in tree if k.startswith("layer_")]
    rest = {k: stacked_layers(v, cycle, xp) for k, v in tree.items() if k not in layers}
    if not layers:
        return rest
    ordered = [tree[f"layer_{i}"] for i in range(len(layers))]
    groups = {
        f"layer_{i}": jax.tree.map(lambda *x: xp.stack(x), *ordered[i::cycle])
        for i in range(cycle)
    }
    return rest | {"layers": groups}


def looped_layers(tree: Any) -> Any:
    """The inverse of `stacked_layers`."""
    if not isinstance(tree, dict):
        return tree
    if "layers" not in tree:
        return {k: looped_layers(v) for k, v in tree.items()}
    out = {k: looped_layers(v) for k, v in tree.items() if k != "layers"}
    groups = tree["layers"]
    repeats = len(jax.tree.leaves(groups)[0])
    for i in range(repeats * len(groups)):
        group = groups[f"layer_{i % len(groups)}"]
        out[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i // len(groups)], group)
    return out
