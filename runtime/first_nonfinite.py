"""Which module was the first to give something that is not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def first_nonfinite(call: Callable[[], Any]) -> str:
    """Path of the first module of which an output has a NaN or an infinity; '' if none.

    `call` applies modules. It runs operation by operation, which is slow, and what is
    traced nevertheless (inside a rematerialised block) is looked at from outside.
    """
    found: list[str] = []

    def look(run: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        out = run(*args, **kwargs)
        if not found and not is_finite(out):
            path = "/".join(context.module.path) or type(context.module).__name__
            method = context.method_name
            found.append(path if method == "__call__" else f"{path}.{method}")
        return out

    with jax.disable_jit(), nn.intercept_methods(look):
        call()
    return next(iter(found), "")


def is_finite(tree: Any) -> bool:
    """Are all floats of all arrays finite? Traced ones count as such."""
    for x in jax.tree.leaves(tree):
        known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        inexact = known and jnp.issubdtype(x.dtype, jnp.inexact)
        if inexact and not bool(jnp.isfinite(x).all()):
            return False
    return True
