"""What checkpoints hold, read by path: no model, optimiser or config is needed."""

import math
from typing import Any

import jax
import numpy as np

from triform.runtime.checkpoint import Checkpointer

Arrays = dict[str, np.ndarray]


def wanted(described: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes by path of what a checkpoint's JSON describes, on this host."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found = {}
    for path, x in described.items():
        dtype: Any = x.get("key")
        if dtype is not None:
            dtype = jax.eval_shape(lambda impl=dtype: jax.random.key(0, impl=impl))
            dtype = dtype.dtype
        else:
            dtype = np.dtype(x["dtype"])
        shape = tuple(x["shape"])
        found[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return found


def read(checkpointer: Checkpointer, step: int) -> tuple[Arrays, dict[str, Any]]:
    """(arrays by path, what was saved beside them) of a step, checksums verified.

    Of a key the raw data. Moves nothing; CheckpointError if the step is missing or
    corrupt.
    """
    shapes = wanted(checkpointer.described(step))
    state, meta = checkpointer.restore(shapes, step)
    arrays = {}
    for path, x in state.items():
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        arrays[path] = np.asarray(x)
    return arrays, meta


def norm(x: np.ndarray) -> float:
    """Euclidean norm in float64; NaN and infinities show in it."""
    return math.sqrt(float(np.square(x.astype(np.float64)).sum()))


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """How two arrays differ; '' if every byte is the same."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
    if a.tobytes() == b.tobytes():
        return ""
    x, y = a.astype(np.float64), b.astype(np.float64)
    changed = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)[changed]
    largest = float(apart.max(initial=0.0))
    scale = norm(x) or 1.0
    relative = math.sqrt(float(np.square(apart).sum())) / scale
    count = int(changed.sum())
    return (
        f"{count:,} of {a.size:,} elements, largest difference {largest:.3g}, norm of "
        f"the difference {relative:.3g} of the first one's"
    )
