"""The description of a batch: its fields, their axes, and what follows from them.

Axis letters: B rows, L target positions, S source positions, P masked positions,
H height, W width, C channels or codebooks, T frames, M features of a frame, V classes.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from triform.runtime.errors import DataError

Batch = Mapping[str, np.ndarray]
# Axis letter -> size, or the name of one of the model's sizes ("num_labels").
Shape = Mapping[str, int | str]
Sizes = Mapping[str, int]  # name of a size of the model -> its value


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch."""

    axes: str  # "BL", "BHWC", "BTM", "BLC", "B"
    dtype: str = "int32"
    below: str | int = 0  # ids lie in [0, below): a number or a size; 0: no ids
    counts: str = ""  # the field whose non-zero entries mark the real positions


Spec = Mapping[str, Field]


def resolved(shape: Shape, sizes: Sizes) -> dict[str, int]:
    """The shape with every name replaced by the model's size of that name."""
    return {k: sizes[n] if isinstance(n, str) else n for k, n in shape.items()}


def zeros(spec: Spec, shape: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Every field of a batch, zero. Zero weights and segments mean padding."""
    return {
        name: np.zeros([shape[a] for a in field.axes], field.dtype)
        for name, field in spec.items()
    }


def abstract(spec: Spec, shape: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    return {
        name: jax.ShapeDtypeStruct([shape[a] for a in field.axes], field.dtype)
        for name, field in spec.items()
    }


def check(batch: Batch, spec: Spec, sizes: Sizes, name: Callable[[int], str]) -> None:
    """Stops on ids outside their range and on numbers that are not finite.

    An embedding would turn such an id into NaN without an error. `name(row)` says which
    example a row is. Raises DataError with the example, the value and the fix.
    """
    for key, field in spec.items():
        x = batch[key]
        if field.below:
            limit = field.below
            if isinstance(limit, str):
                if limit not in sizes:
                    continue  # the model does not read the field
                limit = sizes[limit]
            bad = (x < 0) | (x >= limit)
            fix = f"raise model.{field.below}"
            if field.below == "vocab_size":
                fix += " or use the tokenizer of this model"
            if not isinstance(field.below, str):
                fix = "correct the data"
            rule = f"outside [0, {limit})"
        elif np.issubdtype(x.dtype, np.floating):
            bad = ~np.isfinite(x)
            rule, fix = "not finite", "correct or remove the example"
        else:
            continue
        if bad.any():
            row = int(np.flatnonzero(bad.reshape(len(x), -1).any(-1))[0])
            value = x[row][bad[row]].flat[0] if x.ndim > 1 else x[row]
            if field.below and value < 0:
                fix = "correct or remove the example"
            raise DataError(f"{name(row)}: {key}={value} is {rule}; {fix}")


def count(batch: Batch, spec: Spec) -> int:
    """Number of real positions (or rows): non-zero entries of every `counts` field."""
    fields = {field.counts for field in spec.values() if field.counts}
    return int(sum((batch[name] != 0).sum() for name in fields))
