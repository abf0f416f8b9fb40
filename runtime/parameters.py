"""One table of parameter axes: sharding, weight decay and Muon's matrices follow."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

Rows = Sequence[tuple[str, str]]

# (regular expression of a path, axes). The first match counts; a parameter without a
# match, or of another rank, is an error.
#   "a b > c"  a kernel from the input axes to the output axes
#   "a b"      a table or another array that weight decay applies to
#   "+ a b"    a bias or scale, never decayed
# A scanned trunk's parameters (those below `layers/`) have one more axis in front.
ROWS: Rows = (
    (r"(query|key|value)(_global)?/kernel$", "embed > heads head"),
    (r"(query|key|value)(_global)?/bias$", "+ heads head"),
    (r"out/kernel$", "heads head > embed"),
    (r"(up|gate)/kernel$", "embed > mlp"),
    (r"(up|gate)/bias$", "+ mlp"),
    (r"down/kernel$", "mlp > embed"),
    (r"(pooler|dense)/kernel$", "embed > hidden"),
    (r"patches/kernel$", "height width channels > embed"),
    (r"(^|/)token$", "one one embed"),
    (r"relative_bias/embedding$", "buckets heads"),
    (r"relative_keys/embedding$", "distances heads head"),
    (r"positions/table/embedding$", "positions embed"),
    (r"embedding$", "vocab embed"),
    (r"head/kernel$", "embed > vocab"),
    (r"(bias|scale)$", "+ features"),
)

# Axis of a parameter -> axis of the mesh that it is split over; others are not split.
SPLIT = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "hidden": "tensor",
    "vocab": "tensor",
}


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one parameter."""

    names: tuple[str, ...]  # one per dimension; "layers" in front if scanned
    inputs: int  # number of input axes of a kernel; 0: not a kernel
    decays: bool  # does weight decay apply?

    def matrix(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(input dimensions, output dimensions) of a hidden layer's kernel, else None.

        Heads over a vocabulary or classes are no hidden layers (Jordan et al. 2024).
        """
        if not self.inputs or "vocab" in self.names:
            return None
        lead = int(self.names[0] == "layers")
        every = tuple(range(lead, len(self.names)))
        return every[: self.inputs], every[self.inputs :]

    def spec(self, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
        """Mesh axes per dimension; those that do not divide a size are left out."""

        def split(name: str, size: int) -> str | None:
            axis = SPLIT.get(name)
            fits = axis and mesh[axis] > 1 and size % mesh[axis] == 0
            return axis if fits else None

        return PartitionSpec(*map(split, self.names, shape))


def axes_of(path: str, shape: Sequence[int], rows: Rows) -> Axes:
    """The axes of a parameter; ValueError without a row or with another rank."""
    text = next((axes for pattern, axes in rows if re.search(pattern, path)), None)
    if text is None:
        raise ValueError(
            f"parameter {path!r} matches no row of parameter axes; add one to "
            "PARAMETERS of the model's config or to runtime/parameters.py"
        )
    before, kernel, after = text.removeprefix("+ ").partition(" > ")
    scanned = "layers" in path.split("/")
    names = ("layers",) * scanned + (*before.split(), *after.split())
    if len(names) != len(shape):
        raise ValueError(
            f"parameter {path!r} has shape {tuple(shape)}, but its axes are "
            f"{' '.join(names)!r}; rename it, or add a row before that one"
        )
    inputs = len(before.split()) if kernel else 0
    return Axes(names, inputs, decays=not text.startswith("+"))
