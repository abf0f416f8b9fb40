"""Placement: where parameters and batches live, by mesh or by pmap.

Both placements run the same pure functions:

    train_step(state, batch, across) -> (state, metrics)
    eval_step(variables, step, batch, across) -> (metrics, rows)

`across` (class Across) is what a step may do over devices.
"""

import contextlib
import dataclasses
import functools
import math
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from triform.runtime import hosts
from triform.runtime.parameters import ROWS, Rows, axes_of
from triform.runtime.paths import path_name

Tree = Any
Batch = Mapping[str, np.ndarray]
AxisLetters = Mapping[str, str]  # field of a batch -> its axes, "BL"
AXES = ("data", "fsdp", "tensor", "sequence")
# Of steps that are compiled in threads, one is traced at a time. Tracing is Python: two
# at once would take twice as long, and the first step of a run waits for one of them.
TRACING = threading.Lock()

# Axis letter of a batch's field -> mesh axes; other axes are not split.
BATCH_AXES = {
    "B": ("data", "fsdp"),
    "L": ("sequence",),
    "S": ("sequence",),
    "T": ("sequence",),
}


@dataclasses.dataclass(frozen=True)
class Across:
    """What a step may do over devices. Under jit the compiler inserts what is needed,
    so all of it is the identity; under pmap these are collectives.
    """

    sum: Callable[[Tree], Tree] = lambda tree: tree  # over devices
    rows: Callable[[jax.Array], jax.Array] = lambda x: x  # [B, ...] of all devices
    index: jax.Array | int = 0  # of this device: it draws its own random numbers
    count: int = 1  # devices that run the step separately

    def mean(self, tree: Tree) -> Tree:
        """Mean over devices of every leaf."""
        if self.count == 1:
            return tree
        return jax.tree.map(lambda x: (x / self.count).astype(x.dtype), self.sum(tree))


@dataclasses.dataclass
class MeshConfig:
    """Devices along each axis; their product must be the number of devices."""

    data: int = 0  # batches split, parameters replicated; 0: all remaining devices
    fsdp: int = 1  # batches and parameters are sharded
    tensor: int = 1  # heads, feed-forward width and vocabulary are sharded
    sequence: int = 1  # positions are sharded

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        for name in AXES:
            size, least = getattr(self, name), 0 if name == "data" else 1
            if size < least:
                raise ValueError(f"mesh.{name}={size}: must be at least {least}")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Devices along (data, fsdp, tensor, sequence); ValueError if impossible."""
        given = [getattr(self, name) for name in AXES]
        rest = math.prod(given[1:])
        data = self.data or max(1, devices // rest)
        if data * rest != devices:
            raise ValueError(
                f"mesh {dict(zip(AXES, given, strict=True))}: the product must be the "
                f"number of devices, {devices}; with mesh.data=0, which takes what "
                "remains, the others must divide it"
            )
        return (data, *given[1:])


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step: (state, batch) -> (state, metrics)."""

    compiled: Any  # jax.stages.Compiled: what it needs, and its text
    run: Callable[[Tree, Tree], tuple[Tree, Tree]]
    jaxpr: Any = None  # for all devices together, where there is such

    def __call__(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """Runs it."""
        return self.run(state, batch)


class MeshPlacement:
    """jit over a mesh with the axes data, fsdp, tensor and sequence."""

    def __init__(
        self, config: MeshConfig, devices: list | None = None, rows: Rows = ROWS
    ):
        devices = devices if devices is not None else jax.devices()
        self.parameters = rows
        sizes = config.sizes(len(devices))
        # Auto, not the default Explicit axes: the compiler propagates shardings.
        self.mesh = jax.make_mesh(
            sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
        )
        self.sizes = dict(zip(AXES, sizes, strict=True))
        self.rows = self.sizes["data"] * self.sizes["fsdp"]  # batch rows: a multiple
        self._several = len({device.process_index for device in devices}) > 1
        everywhere = NamedSharding(self.mesh, P())
        self._gather = jax.jit(lambda tree: tree, out_shardings=everywhere)
        self._compiled: dict[Any, Callable] = {}  # see `call`

    def describe(self) -> str:
        """'mesh data=8 fsdp=1 tensor=1 sequence=1'."""
        return "mesh " + " ".join(f"{k}={v}" for k, v in self.sizes.items())

    def shardings(self, state: Tree) -> Tree:
        """NamedSharding of every leaf of a state or of parameters (abstract or not)."""

        def of(path: tuple, x: Any) -> NamedSharding:
            name, spec = path_name(path), P()
            if name.startswith(("params", "frozen")):
                axes = axes_of(name, x.shape, self.parameters)
                spec = axes.spec(x.shape, self.sizes)
            elif name.startswith("opt_state"):
                # Moments follow their parameters; what has another rank does not.
                with contextlib.suppress(ValueError):
                    axes = axes_of(name, x.shape, self.parameters)
                    spec = axes.spec(x.shape, self.sizes)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(of, state)

    def abstract(self, state: Tree) -> Tree:
        """Shapes with shardings: the target of a restore."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.shardings(state),
        )

    def init(self, make: Callable[[], Tree]) -> Tree:
        """The state that `make` computes, created where it lives."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make)))()

    def load(self, state: Tree) -> Tree:
        """A restored state (see `abstract`) in the form that steps take."""
        return state

    def unload(self, state: Tree) -> Tree:
        """The state as it is saved."""
        return state

    def for_generation(
        self, variables: Tree, batch: Batch, axes: AxisLetters, total: int = 0
    ) -> tuple[Tree, Tree]:
        """Variables and a batch (see `put`) as text is generated from them."""
        return variables, self.put(batch, axes, total=total)

    def held(self, total: int, parts: int = 1) -> slice:
        """The rows of a batch of `total` that this process's devices need."""
        padded = total + -total % (self.rows * parts)
        if not self._several:
            return slice(0, padded)
        sharding = NamedSharding(self.mesh, P(BATCH_AXES["B"]))
        places = sharding.addressable_devices_indices_map((padded,)).values()
        ranges = [place[0].indices(padded) for place in places]
        return slice(min(r[0] for r in ranges), max(r[1] for r in ranges))

    def put(
        self, batch: Batch, axes: AxisLetters, parts: int = 1, total: int = 0
    ) -> Mapping[str, jax.Array]:
        """The batch on the devices: all of it, or of `total` rows the `held` ones.

        Rows are padded so that each of `parts` micro-batches divides evenly. Sequence
        axes are split where their size allows it.
        """
        total = total or len(next(iter(batch.values())))
        held = self.held(total, parts)
        padded = total + -total % (self.rows * parts)
        if len(next(iter(batch.values()))) == total:
            held = slice(0, padded)
        batch = pad_rows(batch, held.stop - held.start)

        def place(name: str, x: np.ndarray) -> jax.Array:
            shape = (padded, *x.shape[1:])
            sharding = self._split(axes[name], shape)

            def part(index: tuple) -> np.ndarray:
                start, stop, _ = index[0].indices(padded)
                return x[start - held.start : stop - held.start, *index[1:]]

            return jax.make_array_from_callback(shape, sharding, part)

        return {name: place(name, x) for name, x in batch.items()}

    def abstract_batch(
        self, batch: Batch, axes: AxisLetters, parts: int = 1
    ) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of what `put` gives; no array is made."""
        multiple = self.rows * parts

        def of(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
            shape = (-(-len(x) // multiple) * multiple, *x.shape[1:])
            sharding = self._split(axes[name], shape)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return {name: of(name, x) for name, x in batch.items()}

    def _split(self, letters: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where a field of a batch is."""

        def axis(letter: str, size: int) -> tuple[str, ...] | None:
            over = BATCH_AXES.get(letter, ())
            fits = size % math.prod(self.sizes[a] for a in over) == 0
            return over if over and fits else None

        return NamedSharding(self.mesh, P(*map(axis, letters, shape)))

    def spread(self, batch: Batch, axes: AxisLetters) -> Mapping[str, jax.Array]:
        """A batch on the devices of one process, whose rows divide evenly. Axis letters
        that are not in BATCH_AXES are not split.
        """
        places = {name: self._split(axes[name], x.shape) for name, x in batch.items()}
        return jax.device_put(dict(batch), places)

    def same(self, x: np.generic) -> np.ndarray:
        """A number of the host as steps take it beside a batch."""
        return np.asarray(x)

    def compile_train(self, step: Callable, state: Tree, batch: Tree) -> "Step":
        """(state, batch) -> (state, metrics), compiled for these shapes.

        The state is donated.
        """

        def pinned(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
            out, metrics = step(state, batch, Across())
            # Without this the compiler may return a state placed otherwise.
            out = jax.lax.with_sharding_constraint(out, self.shardings(out))
            return out, self._readable(metrics)

        jitted = jax.jit(pinned, donate_argnums=0)
        with TRACING:
            traced = jitted.trace(state, batch)
            lowered = traced.lower()
        compiled = lowered.compile()
        run = lambda *inputs: block_on_cpu(compiled(*inputs))  # noqa: E731
        return Step(compiled, run, traced.jaxpr)

    def compile_eval(self, step: Callable) -> Callable:
        """(variables, step, batch) -> (metrics, rows)."""

        @jax.jit
        def compiled(*inputs: Tree) -> tuple[Tree, Tree]:
            metrics, rows = step(*inputs, across=Across())
            return self._readable(metrics), rows

        return lambda *inputs: block_on_cpu(self.call(compiled, *inputs))

    def call(self, jitted: Callable, *inputs: Tree) -> Tree:
        """jitted(*inputs); several processes run it once all have compiled it.

        A process that compiles longer than others would else keep them in a collective,
        which gives up after half a minute (gloo) and names nobody.
        """
        if not self._several:
            return jitted(*inputs)
        kinds = [
            (x.shape, str(x.dtype), str(getattr(x, "sharding", "")))
            for x in jax.tree.leaves(inputs)
        ]
        key = jitted, str(kinds)
        if key not in self._compiled:
            self._compiled[key] = jitted.lower(*inputs).compile()
            hosts.here().barrier("compiling", hosts.SLOW)
        return self._compiled[key](*inputs)

    def _readable(self, metrics: Tree) -> Tree:
        """Metrics that every process can read."""
        if not self._several:
            return metrics
        return jax.lax.with_sharding_constraint(metrics, NamedSharding(self.mesh, P()))

    def fetch(self, tree: Tree) -> Tree:
        """Arrays on the host, whole on every process."""
        if self._several:
            tree = block_on_cpu(self.call(self._gather, tree))
        return jax.tree.map(np.asarray, tree)


class PmapPlacement:
    """Replicated data parallelism through jax.pmap."""

    def __init__(
        self, config: MeshConfig, devices: list | None = None, rows: Rows = ROWS
    ):
        self.devices = devices if devices is not None else jax.local_devices()
        sizes = config.sizes(len(self.devices))
        if sizes[0] != len(self.devices):
            raise ValueError(
                f"placement='pmap' with mesh {dataclasses.asdict(config)}: pmap only "
                "splits batches; use placement='mesh' or set the other axes to 1"
            )
        if jax.process_count() > 1:
            raise ValueError(
                f"placement='pmap' with {jax.process_count()} processes: pmap runs on "
                "one; use placement='mesh'"
            )
        self.rows = len(self.devices)

    def describe(self) -> str:
        """'pmap over 8 devices'."""
        return f"pmap over {len(self.devices)} devices"

    def shardings(self, state: Tree) -> Tree:
        """Where a restore puts a state: the first device; `load` replicates it."""
        one = jax.sharding.SingleDeviceSharding(self.devices[0])
        return jax.tree.map(lambda _: one, state)

    abstract = MeshPlacement.abstract

    def init(self, make: Callable[[], Tree]) -> Tree:
        """The state that `make` computes, replicated."""
        return self.load(jax.jit(make)())

    def load(self, state: Tree) -> Tree:
        """A copy of the state for every device."""
        mesh = jax.sharding.Mesh(np.array(self.devices), ("data",))
        spread = NamedSharding(mesh, P("data"))

        def copy(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x[None], (len(self.devices), *x.shape))

        copies = jax.tree.map(lambda _: spread, state)
        return jax.jit(lambda tree: jax.tree.map(copy, tree), out_shardings=copies)(
            jax.device_put(state, NamedSharding(mesh, P()))
        )

    def unload(self, state: Tree) -> Tree:
        """The first device's copy."""
        return jax.tree.map(lambda x: x.addressable_data(0)[0], state)

    def for_generation(
        self, variables: Tree, batch: Batch, axes: AxisLetters, total: int = 0
    ) -> tuple[Tree, Tree]:
        """Variables and a batch for generation, on one device."""
        return self.unload(variables), batch

    def held(self, total: int, parts: int = 1) -> slice:
        """All rows of a batch: pmap runs on one process."""
        return slice(0, total)

    def call(self, jitted: Callable, *inputs: Tree) -> Tree:
        """jitted(*inputs)."""
        return jitted(*inputs)

    def fetch(self, tree: Tree) -> Tree:
        """Arrays on the host."""
        return jax.tree.map(np.asarray, tree)

    def abstract_batch(
        self, batch: Batch, axes: AxisLetters, parts: int = 1
    ) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes of what `put` gives."""
        put = self.put(batch, axes, parts)
        return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in put.items()}

    def put(
        self, batch: Batch, axes: AxisLetters, parts: int = 1, total: int = 0
    ) -> Batch:
        """The batch with a leading device axis; pmap moves it. See MeshPlacement."""
        batch = pad_rows(batch, self.rows * parts)
        n = self.rows
        return {
            k: x.reshape(n, x.shape[0] // n, *x.shape[1:]) for k, x in batch.items()
        }

    def same(self, x: np.generic) -> np.ndarray:
        """A number of the host as steps take it beside a batch: one a device."""
        return np.full(self.rows, x)

    def compile_train(self, step: Callable, state: Tree, batch: Tree) -> "Step":
        """(state, batch) -> (state, metrics), compiled for these shapes.

        The state is donated.
        """
        mapped = self._pmap(step, donate_argnums=0)
        with TRACING:
            lowered = mapped.lower(state, batch)
        compiled = lowered.compile()

        def run(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
            state, metrics = block_on_cpu(compiled(state, batch))
            return state, self.unload(metrics)

        return Step(compiled, run)

    def compile_eval(self, step: Callable) -> Callable:
        """(variables, step, batch) -> (metrics, rows)."""
        mapped = self._pmap(step, in_axes=(0, None, 0))

        def run(*inputs: Tree) -> tuple[Tree, Tree]:
            metrics, rows = block_on_cpu(mapped(*inputs))
            merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
            return self.unload(metrics), jax.tree.map(merge, rows)

        return run

    def _pmap(self, step: Callable, **options) -> Callable:
        def across(*inputs: Tree) -> Tree:
            gather = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True)
            total = functools.partial(jax.lax.psum, axis_name="data")
            index = jax.lax.axis_index("data")
            return step(*inputs, Across(total, gather, index, len(self.devices)))

        return jax.pmap(across, axis_name="data", devices=self.devices, **options)


def block_on_cpu(results: Tree) -> Tree:
    """Blocks until the results are ready, but only on several CPU devices.

    Two programs with collectives in flight at once can deadlock there: every device
    holds a thread, and there are fewer threads than devices times programs.
    """
    device = next(iter(jax.tree.leaves(results)[0].devices()))
    if device.platform == "cpu" and jax.device_count() > 1:
        return jax.block_until_ready(results)
    return results


PLACEMENTS = {"mesh": MeshPlacement, "pmap": PmapPlacement}


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Appends rows of zeros (weight and segment 0) up to a multiple of rows."""
    rows = len(next(iter(batch.values())))
    extra = -rows % multiple
    if not extra:
        return batch
    return {
        k: np.concatenate([x, np.zeros((extra, *x.shape[1:]), x.dtype)])
        for k, x in batch.items()
    }


def parameter_table(params: Tree, placement: MeshPlacement | PmapPlacement) -> str:
    """One line a kind of parameter, then the totals: count, bytes, bytes a device."""
    shardings = placement.shardings({"params": params})["params"]
    rows: dict[tuple, int] = {}
    flat = jax.tree_util.tree_leaves_with_path(params)
    count = size = held = 0
    for (path, x), sharding in zip(flat, jax.tree.leaves(shardings), strict=True):
        spec = getattr(sharding, "spec", P())
        split = ", ".join(str(s) for s in spec) if any(spec) else "replicated"
        # Layers that are alike share a line.
        name = re.sub(r"layer_\d+", "layer_*", path_name(path))
        row = (name, str(x.shape), split)
        rows[row] = rows.get(row, 0) + x.size
        count, size = count + x.size, size + x.size * x.dtype.itemsize
        held += math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [
        f"  {name:<{wide[0]}}  {shape:<{wide[1]}}  {total:>13,}  {split}"
        for (name, shape, split), total in rows.items()
    ]
    total = f"{count:,} parameters, {size / 1e6:,.1f} MB, {held / 1e6:,.1f} MB a device"
    return "\n".join([*lines, f"  {total}"])
