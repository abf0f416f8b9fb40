"""The engine: rows that pair our parameters with Hugging Face tensors, read both ways.

A row names one tensor and the parameters that it holds, with {i} for the layer, and a
pair of exact inverses between them: reshape, transpose, slice and concatenate only, so
that importing and exporting gives the same bytes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from triform import models
from triform.data.batch import Field, abstract
from triform.interop import settings
from triform.interop.settings import Given, Setting
from triform.models.config import ModelConfig
from triform.runtime.errors import UserError
from triform.runtime.paths import path_name

Shape = tuple[int, ...]
Reads = Mapping[str, tuple[str, str]]  # field of a batch -> (axes, dtype)
# Path of a parameter, and the layer's index in it if layers are stacked.
Element = tuple[str, int | None]


@dataclasses.dataclass(frozen=True)
class Inverse:
    """Two exact inverses."""

    ours: Callable[[np.ndarray, Shape], np.ndarray]  # of a tensor, to this shape
    theirs: Callable[[np.ndarray], np.ndarray]  # of a parameter


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor and the parameters in it, one after the other along its last axis."""

    ours: tuple[str, ...]
    theirs: str
    how: Inverse


def _columns(x: np.ndarray, inputs: int) -> np.ndarray:
    """A kernel as a matrix [in, out]; its first `inputs` axes are the in."""
    return x.reshape(math.prod(x.shape[:inputs]), -1)


def _kernel(inputs: int) -> Inverse:
    """torch.nn.Linear keeps [out, in]."""
    return Inverse(lambda x, shape: x.T.reshape(shape), lambda x: _columns(x, inputs).T)


def _conv1d(inputs: int) -> Inverse:
    """GPT-2's Conv1D keeps [in, out]."""
    return Inverse(lambda x, shape: x.reshape(shape), lambda x: _columns(x, inputs))


SAME = Inverse(lambda x, shape: x, lambda x: x)
# A bias of heads, [H, E] with us.
FLAT = Inverse(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
# An axis of one row before ours.
LEAD = Inverse(lambda x, shape: x[0], lambda x: x[None])
# [D, C, h, w] there, [h, w, C, D] here.
IMAGE = Inverse(
    lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)


def same(ours: str, theirs: str, how: Inverse = SAME) -> list[Row]:
    """One parameter, one tensor."""
    return [Row((ours,), theirs, how)]


def table(ours: str, theirs: str) -> list[Row]:
    """An embedding."""
    return same(f"{ours}/embedding", f"{theirs}.weight")


def linear(ours: str, theirs: str, bias: bool = True, inputs: int = 1) -> list[Row]:
    """A dense layer; attention's `out` has two input axes."""
    kernel = same(f"{ours}/kernel", f"{theirs}.weight", _kernel(inputs))
    return kernel + (same(f"{ours}/bias", f"{theirs}.bias", FLAT) if bias else [])


def conv1d(ours: str | list[str], theirs: str, inputs: int = 1) -> list[Row]:
    """GPT-2's dense layer with a bias; several of ours lie side by side."""
    ours = [ours] if isinstance(ours, str) else ours
    kernels, biases = (tuple(f"{x}/{k}" for x in ours) for k in ("kernel", "bias"))
    return [
        Row(kernels, f"{theirs}.weight", _conv1d(inputs)),
        Row(biases, f"{theirs}.bias", FLAT),
    ]


def norm(ours: str, theirs: str, bias: bool = True) -> list[Row]:
    """LayerNorm, or RMSNorm without a bias."""
    scale = same(f"{ours}/scale", f"{theirs}.weight")
    return scale + (same(f"{ours}/bias", f"{theirs}.bias") if bias else [])


@dataclasses.dataclass(frozen=True)
class Family:
    """What is to be known of one `model_type` of transformers."""

    model_type: str
    config_type: type
    # Classes whose weights can be read; the first if a config.json names none.
    architectures: tuple[str, ...]
    prefix: str  # of the base model's tensors; files of a base model lack it
    settings: tuple[Setting, ...]
    rows: Callable[[Any], list[Row]]
    # What no row of `settings` says. Of a config.json and weights or None: {path in our
    # config: value}; UserError for what we do not do.
    read: Callable[[Given, Any], dict[str, Any]] = lambda hf, weights: {}
    write: Callable[[Any], dict[str, Any]] = lambda config: {}  # keys of config.json
    # Of our config: what transformers cannot express.
    limits: Callable[[Any], list[str]] = lambda config: []
    # Keys that `settings` lacks.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Tensors that may be stored twice: another name -> the name in a row.
    copies: Callable[[Any], dict[str, str]] = lambda config: {}
    heads: tuple[str, ...] = ()  # how names of tensors beside the base model begin
    ignored: str = r"$^"  # regular expression of buffers that are no parameters
    left_out: str = r"$^"  # of tensors without a counterpart; an import says so
    # Buffers that follow from our config, {name: values}: they are written, and `read`
    # looks at those that are stored.
    constants: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
    renamed: tuple[tuple[str, str], ...] = ()  # old names: expression, replacement
    # Our modules that files of the base model lack: freshly initialised.
    fresh: tuple[str, ...] = ()
    # Fields of a batch that bring parameters with them: {field: (axes, dtype)}.
    reads: Reads = dataclasses.field(default_factory=dict)

    def obstacles(self, config: Any) -> list[str]:
        """What transformers cannot express of a config."""
        return settings.obstacles(self.settings, config) + self.limits(config)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor, with its layer filled in."""

    name: str
    elements: tuple[Element, ...]
    how: Inverse
    shapes: tuple[Shape, ...]  # of the parameters in it

    def shape(self) -> Shape:
        """The tensor's."""
        parts = [
            jax.eval_shape(self.how.theirs, jax.ShapeDtypeStruct(s, np.float32)).shape
            for s in self.shapes
        ]
        if len(parts) == 1:
            return parts[0]
        return (*parts[0][:-1], sum(part[-1] for part in parts))

    def split(self, tensor: np.ndarray) -> Iterator[tuple[Element, np.ndarray]]:
        """(element, value) of every parameter in a tensor; views."""
        if len(self.elements) == 1:
            yield self.elements[0], self.how.ours(tensor, self.shapes[0])
            return
        parts = np.split(tensor, len(self.elements), axis=-1)
        for element, part, shape in zip(self.elements, parts, self.shapes, strict=True):
            yield element, self.how.ours(part, shape)

    def join(self, values: list[np.ndarray]) -> np.ndarray:
        """The tensor of its parameters."""
        parts = [self.how.theirs(x) for x in values]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)


def parameters(
    config: ModelConfig, reads: Reads | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of all parameters of a model config.

    `reads` are the family's: fields of a batch that bring parameters with them.
    """
    spec = {name: Field(*x) for name, x in (config.reads() | dict(reads or {})).items()}
    sizes = {axis: 2 for field in spec.values() for axis in field.axes}
    batch = abstract(spec, sizes | {"B": 1} | config.axes())
    init = models.build(config).init
    tree = jax.eval_shape(init, jax.random.key(0), batch)["params"]
    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def entries(
    family: Family, config: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> list[Entry]:
    """The family's table for one config, layer by layer.

    UserError if a parameter is in no row, or a row's is not there.
    """
    trunk, found = config.trunk, []
    for row in family.rows(config):
        count = trunk.num_layers if "{i}" in row.theirs else 1
        for i in range(count):
            elements = tuple(_element(path, i, trunk) for path in row.ours)
            if missing := [path for path, _ in elements if path not in shapes]:
                raise UserError(
                    f"{family.model_type}: {row.theirs} needs a parameter of ours, "
                    f"but the model has no {missing[0]}"
                )
            lead = [index is not None for _, index in elements]
            sizes = tuple(
                shapes[path].shape[k:]
                for (path, _), k in zip(elements, lead, strict=True)
            )
            name = row.theirs.replace("{i}", str(i))
            found.append(Entry(name, elements, row.how, sizes))
    covered = {path for entry in found for path, _ in entry.elements}
    if left := sorted(set(shapes) - covered):
        raise UserError(
            f"{family.model_type} has no tensors for {len(left)} of our parameters: "
            f"{', '.join(left)}"
        )
    return found


def _element(path: str, i: int, trunk: Any) -> Element:
    if "{i}" not in path:
        return path, None
    if not trunk.scan_layers:
        return path.replace("{i}", str(i)), None
    width = trunk.cycle()
    return path.replace("layer_{i}", f"layers/layer_{i % width}"), i // width


def canonical(family: Family, names: Collection[str]) -> dict[str, str]:
    """{the name in rows: the name in the file}, buffers left out.

    Old files call norms otherwise, and files of a base model lack its prefix.
    """
    bare = family.prefix and not any(n.startswith(family.prefix) for n in names)
    found = {}
    for name in names:
        known = name
        if bare and not known.startswith(family.heads):
            known = family.prefix + known
        for pattern, replacement in family.renamed:
            known = re.sub(pattern, replacement, known)
        if not re.search(family.ignored, known):
            found[known] = name
    return found
