"""The leaves of a tree as a checkpoint stores them: by path."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from triform.runtime.errors import CheckpointError

GROUP = 1 << 26  # bytes that are read at a time, or one array


def groups(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Parts of about GROUP bytes: what is read is in memory twice until it is placed.

    Large ones come first, while little else is there.
    """
    parts, size = [{}], 0
    for path, x in sorted(arrays.items(), key=lambda item: -item[1].size):
        size += x.size * x.dtype.itemsize
        if size > GROUP and parts[-1]:
            parts.append({})
            size = x.size * x.dtype.itemsize
        parts[-1][path] = x
    return parts


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{path: leaf}, the paths as they are named in a checkpoint."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise CheckpointError(f"two leaves have the path {name}; rename one")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            rule = "a state holds jax.Arrays only; convert it with jnp.asarray"
            raise CheckpointError(f"{name} is a {type(leaf).__name__}: {rule}")
        flat[name] = leaf
    return flat


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def storage(leaf: Any) -> Any:
    """The array that is stored for a leaf: a typed key's raw data, else the leaf."""
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def describe(leaf: Any) -> dict[str, Any]:
    """Shape, dtype and, of a typed key, its implementation: strings for a JSON."""
    described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        described["key"] = str(jax.random.key_impl(leaf))
    return described


def require_same(step: int, saved: dict, wanted: dict) -> None:
    """Raise CheckpointError, naming the first leaves, if other arrays were saved."""
    show = "{dtype}{shape}".format
    new = {path: show(**describe(leaf)) for path, leaf in wanted.items()}
    old = {path: show(**described) for path, described in saved.items()}
    differ = [
        f"{path} (saved {old.get(path, 'nothing')}, wanted {new.get(path, 'nothing')})"
        for path in {**new, **old}
        if old.get(path) != new.get(path)
    ]
    if differ:
        raise CheckpointError(
            f"step {step} was saved by another model or optimiser: {some(differ)}; "
            "restore with the config it was saved with, or use a new directory"
        )


def not_finite(tree: Any) -> list[str]:
    """The paths of leaves that hold a NaN or an infinity; waits for their values."""
    leaves = flatten(tree)
    floats = {k: x for k, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    jax.block_until_ready(floats)
    # One after another: several programs with collectives in flight can deadlock where
    # a CPU has fewer cores than (simulated) devices.
    return [path for path, x in floats.items() if not bool(_finite(x))]


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def some(names: list[str]) -> str:
    """Names for a message: the first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))
