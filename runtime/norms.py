"""Norms of gradients, parameters and updates, by layer and kind of module."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from triform.runtime.paths import path_name
from triform.runtime.scopes import kind_of

Array = jax.Array


def grouped(tree: Any) -> dict[str, Array]:
    """{'decoder/layer_3/attention': Euclidean norm} of parameters or the like.

    Layers of a scanned trunk have the names that they have in a looped one. What is in
    no layer has the kind's name alone.
    """
    squares: dict[str, Array] = {}
    flat = [
        (path_name(path), x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    cycles: dict[str, set[int]] = {}
    for path, _ in flat:
        if found := _scanned(path):
            cycles.setdefault(found[1], set()).add(int(found[2]))
    for path, x in flat:
        kind = kind_of(path).replace(" ", "_")
        x = x.astype(jnp.float32)
        if found := _scanned(path):
            every = jnp.sum(x * x, axis=tuple(range(1, x.ndim)))
            count = len(cycles[found[1]])
            names = {
                f"{found[1]}layer_{int(found[2]) + count * i}/{kind}": every[i]
                for i in range(x.shape[0])
            }
        else:
            layer = re.match(r".*?layer_\d+/", path)
            names = {f"{layer[0] if layer else ''}{kind}": jnp.sum(x * x)}
        for name, square in names.items():
            squares[name] = squares.get(name, 0.0) + square
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def _scanned(path: str) -> re.Match[str] | None:
    """Groups: what is before `layers/`, the layer within a cycle; None if looped."""
    return re.match(r"(.*?)layers/layer_(\d+)/", path)


def of_step(grads: Any, params: Any, updates: Any) -> Mapping[str, Array]:
    """{'grad_norm/...', 'param_norm/...', 'update_norm/...': norm} of one step.

    An update is what is added to the parameters, rate and decay included.
    """
    # Apart from the step: without it norms might be fused with the update, and another
    # order of additions would change the last bits of a run that logs them.
    trees = jax.lax.optimization_barrier((grads, params, updates))
    names = ("grad_norm", "param_norm", "update_norm")
    return {
        f"{name}/{group}": norm
        for name, tree in zip(names, trees, strict=True)
        for group, norm in grouped(tree).items()
    }
