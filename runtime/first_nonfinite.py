"""Which module was the first to give something that is not finite."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def first_nonfinite(call: Callable[[], Any]) -> str:
    """Path of the first module of which an output has a NaN or an infinity; '' if none.

    Layers of a scanned trunk have the names that they have in a looped one. `call`
    applies modules. It runs operation by operation, which is slow, and what is traced
    nevertheless (inside a rematerialised block) is looked at from outside.
    """
    found: list[str] = []
    calls: Counter[str] = Counter()  # of a module, since the whole model was called

    def look(run: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        path, method = "/".join(context.module.path), context.method_name
        if not path:
            calls.clear()
        out = run(*args, **kwargs)
        if not found and not is_finite(out):
            name = looped(path, calls) or type(context.module).__name__
            found.append(name if method == "__call__" else f"{name}.{method}")
        calls[path] += any(map(_is_known, jax.tree.leaves(out)))
        return out

    with jax.disable_jit(), nn.intercept_methods(look):
        call()
    return next(iter(found), "")


def looped(path: str, calls: Counter[str]) -> str:
    """'decoder/layer_3/attention' of 'decoder/layers/layer_1/attention', the second of
    two layers that a loop goes through, if it was called once before.
    """
    scanned = re.match(r"(.*?)layers/layer_(\d+)(.*)", path, re.S)
    if not scanned:
        return path
    lead, number, rest = scanned.groups()
    inside = re.compile(rf"{re.escape(lead)}layers/(layer_\d+)$")
    cycle = {layer[1] for name in calls if (layer := inside.match(name))}
    return f"{lead}layer_{int(number) + len(cycle) * calls[path]}{rest}"


def is_finite(tree: Any) -> bool:
    """Are all floats of all arrays finite? Traced ones count as such."""
    for x in jax.tree.leaves(tree):
        inexact = _is_known(x) and jnp.issubdtype(x.dtype, jnp.inexact)
        if inexact and not bool(jnp.isfinite(x).all()):
            return False
    return True


def _is_known(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
