"""Parameters out of a folder of weights and into one, tensor by tensor."""

import collections
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from triform.interop import families
from triform.interop.mapping import Entry, Family, Shape, canonical, entries, parameters
from triform.interop.weights import DTYPES, Tensor, Weights
from triform.runtime.errors import UserError

Parameters = dict[str, np.ndarray]
ALIGNMENT = 64  # bytes; XLA takes an array that is aligned to it without copying


class Import:
    """What a folder's weights become; `read` fills the parameters.

    Raises UserError, in one line, for a setting that we do not do and for all tensors
    that are unknown here or absent.
    """

    def __init__(
        self,
        weights: Weights,
        hf: Mapping[str, Any],
        scan_layers: bool = False,
        ignore: Iterable[str] = (),
    ):
        self.weights = weights
        self.family = families.family_of(hf)
        self.architecture = families.complete(hf)["architectures"][0]
        names = canonical(self.family, weights.names)
        dropped = {
            known: name
            for known, name in names.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
            or re.search(self.family.left_out, known)
        }
        self.ignored = sorted(dropped.values())
        weights.names = {k: v for k, v in names.items() if k not in dropped}
        self.config = families.model_config(hf, weights)
        self.config.trunk.scan_layers = scan_layers
        self.shapes = parameters(self.config, self.family.reads)
        self.entries = entries(self.family, self.config, self.shapes)
        self.fresh = self._check()
        fresh = {entry.name for entry in self.fresh}
        kept = [entry.name for entry in self.entries if entry.name not in fresh]
        kinds = {name: weights.dtype(name) for name in kept}
        for name, kind in kinds.items():
            if kind not in DTYPES:
                raise UserError(
                    f"{name} is stored as {kind}: parameters can be imported from "
                    f"{', '.join(DTYPES)}; convert the weights"
                )
        count = collections.Counter(kinds.values())
        self.dtype = count.most_common(1)[0][0] if count else "F32"
        # Tensors whose dtype is another one, so that they can be written as they were.
        self.odd = {name: k for name, k in kinds.items() if k != self.dtype}

    def _check(self) -> list[Entry]:
        """The entries to be initialised; UserError that lists what does not match."""
        weights, stored = self.weights, self.weights.names
        expected = {entry.name: entry for entry in self.entries}
        copies = self.family.copies(self.config)
        # A file may hold only the copy.
        for copy, name in copies.items():
            if name not in stored and copy in stored:
                stored[name] = stored.pop(copy)
        absent = [entry for name, entry in expected.items() if name not in stored]
        body = self.architecture.endswith("Model")
        fresh = self.family.fresh if body else ()
        missing = [
            entry.name
            for entry in absent
            if not all(path.split("/")[0] in fresh for path, _ in entry.elements)
        ]
        known = {*expected, *copies, *self.family.constants(self.config)}
        left = [name for key, name in stored.items() if key not in known]
        lines = []
        if left:
            lines.append(f"unknown to this model: {', '.join(sorted(left))}")
        if missing:
            lines.append(f"not in the files: {', '.join(sorted(missing))}")
        if lines:
            hint = "; leave tensors out on purpose with --ignore=PATTERN" * bool(left)
            raise UserError(
                f"{weights.folder}: tensors of {self.architecture} {'; '.join(lines)}"
                f"{hint or '; import the complete folder that it was saved in'}"
            )
        for name, entry in expected.items():
            if name in stored and weights.shape(name) != entry.shape():
                raise UserError(
                    f"{weights.folder}: {stored[name]} is {weights.shape(name)}, by "
                    f"config.json it should be {entry.shape()}; use the config.json of "
                    "these weights"
                )
        for copy, name in copies.items():
            if copy in stored and not weights.same(copy, name):
                raise UserError(
                    f"{weights.folder}: {copy} differs from {name}, but config.json "
                    "ties them; if they were trained apart, set tie_word_embeddings to "
                    "false"
                )
        return absent

    def count(self) -> int:
        """Parameters in all."""
        return sum(math.prod(x.shape) for x in self.shapes.values())

    def size(self) -> int:
        """Bytes of all parameters, float32."""
        return 4 * self.count()

    def read(self, report: Callable[[int], Any] = lambda size: None) -> Parameters:
        """{path: float32}; `report` is lines the bytes of what has been filled.

        Values are copied as they are read: besides the parameters no
        more than one tensor is in memory.
        """
        params = {path: _aligned(x.shape) for path, x in self.shapes.items()}
        rng = np.random.default_rng(0)
        fresh = {entry.name for entry in self.fresh}
        for entry in self.entries:
            if entry.name in fresh:
                for path, _ in entry.elements:
                    _initialise(path, params[path], rng)
            else:
                for (path, i), value in entry.split(self.weights.read(entry.name)):
                    target = params[path] if i is None else params[path][i]
                    np.copyto(target, value)
            report(4 * sum(math.prod(shape) for shape in entry.shapes))
        return params


def _aligned(shape: Shape) -> np.ndarray:
    """Uninitialised float32."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)


def _initialise(path: str, target: np.ndarray, rng: np.random.Generator) -> None:
    """A head as BERT's are: a normal of 0.02, biases 0."""
    target[...] = 0
    if path.endswith("kernel"):
        target[...] = 0.02 * rng.standard_normal(target.shape, np.float32)


def tensors(
    family: Family,
    config: Any,
    params: Mapping[str, np.ndarray],
    dtype: str = "F32",
    odd: Mapping[str, str] | None = None,
) -> list[Tensor]:
    """What is to be written, in `dtype` but for the `odd` ones."""
    odd = odd or {}

    def make(entry: Entry) -> Callable[[], np.ndarray]:
        def values() -> np.ndarray:
            parts = (
                params[p] if i is None else params[p][i] for p, i in entry.elements
            )
            return entry.join(list(parts))

        return values

    found = entries(family, config, parameters(config, family.reads))
    kinds = {kind: name for name, kind in DTYPES.items()}
    constants = [
        Tensor(name, x.shape, kinds[x.dtype], functools.partial(np.asarray, x))
        for name, x in family.constants(config).items()
    ]
    return constants + [
        Tensor(entry.name, entry.shape(), odd.get(entry.name, dtype), make(entry))
        for entry in found
    ]
