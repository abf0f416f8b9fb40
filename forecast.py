"""What a training step costs: memory, FLOPs and time, before it runs and beside it.

From abstract shapes and the rules of sharding alone, so that it can be said of a model
of any size and of devices that are not here. What each number means, and how far from
the truth it was: docs/planning.md.
"""

import contextvars
import copy
import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax

from triform.configs.schema import ExperimentConfig, OptimConfig
from triform.experiment import Experiment
from triform.models.algorithms.flash import told
from triform.runtime import chips, guard, leaves, program
from triform.runtime.chips import Devices
from triform.runtime.errors import UserError
from triform.runtime.partition import TRACING, Across, Step
from triform.runtime.paths import path_name
from triform.runtime.program import Program, Value
from triform.runtime.scopes import kind_of
from triform.runtime.units import scaled, shown

UTILISATION = 0.4  # of the peak, assumed unless it is given
SHOWN = 3  # largest arrays that are named
# What these modules give is the same on all devices along the mesh axis `tensor`.
WHOLE = ("out", "down")
SPLIT_KINDS = ("attention", "feed-forward", "logits and loss")
GROUPS = {
    "params": "parameters",
    "frozen": "frozen parameters",
    "opt_state": "optimiser",
}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Bytes of one device; FLOPs of a step of all devices."""

    state: Mapping[str, int]  # parameters, frozen parameters, optimiser, other
    batch: int
    step: int  # the most that a step needs at once beside them
    largest: tuple[tuple[str, int], ...]  # (name, bytes) of what is in use then
    flops: Mapping[str, int]  # by kind of module: what the model needs
    again: int  # recomputed by remat, on top
    open_loops: bool  # are there loops of unknown length? FLOPs are then too low
    rows: int  # of a micro-batch on one device
    checkpoint: int  # bytes on disk of one checkpoint

    def total(self) -> int:
        """Bytes that a device needs."""
        return sum(self.state.values()) + self.batch + self.step


def of(config: ExperimentConfig, rows: int = 0) -> Forecast:
    """The forecast of a resolved config, for the devices that JAX sees.

    `rows`: those of a micro-batch on one device, in place of what the config says.
    """
    experiment, shape = Experiment(config), longest(config)
    k, state = config.optim.accumulate, jax.eval_shape(experiment.make_state)
    rows = rows or local_rows(experiment, shape) // k
    traced = trace(experiment, state, shape, rows * k)
    flops, least = step_flops(experiment, traced, shape, rows * k)
    twice = traced.flops().total() - traced.flops(again=False).total()
    state = experiment.placement.abstract(state)
    sizes = functools.partial(device_size, shares(state), mesh_of(experiment))
    peak = program.peak(traced, sizes, loop=True)
    batch = experiment.empty_batch(shape, rows=rows * k)
    return Forecast(
        state_bytes(state),
        sum(x.nbytes for x in batch.values()) // mesh_of(experiment)["sequence"],
        peak.size + gathered(state),
        tuple((name_of(x), sizes(x)) for x in peak.arrays[:SHOWN]),
        flops,
        twice * experiment.placement.rows,
        least,
        rows,
        checkpoint_bytes(state),
    )


def local_rows(experiment: Experiment, shape: Mapping[str, Any]) -> int:
    """Rows of a batch of this shape on one device, padding included."""
    shards, config = experiment.placement.rows, experiment.config
    k = config.optim.accumulate
    return k * -(-config.data.rows(shape) // (shards * k))


def step_flops(
    experiment: Experiment, traced: Program, shape: Mapping[str, Any], rows: int
) -> tuple[dict[str, int], bool]:
    """({kind of module: FLOPs of a step of all devices}, are they a lower bound?)."""
    config = experiment.config
    counted = needed(config, traced, shape, rows)
    found: Counter[str] = Counter()
    for path, count in counted.flops(again=False, share=seen(config, shape)).items():
        # The optimiser's products are of parameters, whatever the number of rows.
        kind = kind_of(path)
        found[kind] += count * (1 if kind == "optimiser" else experiment.placement.rows)
    return dict(found), counted.open_loops()


def longest(config: ExperimentConfig) -> Mapping[str, Any]:
    """The shape of the batch with the longest rows, whose step needs most memory."""

    def positions(shape: Mapping[str, Any]) -> int:
        return sum(n for n in shape.values() if isinstance(n, int))

    return max(config.data.shapes(), key=positions)


def mesh_of(experiment: Experiment) -> Mapping[str, int]:
    """Devices along each axis of the mesh."""
    rows = {"data": experiment.placement.rows, "fsdp": 1, "tensor": 1, "sequence": 1}
    return getattr(experiment.placement, "sizes", rows)


# What is traced


def trace(
    experiment: Experiment, state: Any, shape: Mapping[str, Any], rows: int
) -> Program:
    """The train step for so many rows of one device."""
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in experiment.empty_batch(shape, rows=rows).items()
    }
    fed = {
        "batch": batch,
        "step": jax.ShapeDtypeStruct((), "int32"),
        "limit": jax.ShapeDtypeStruct((), "float32"),
    }
    step = guard.guarded(experiment.train_step, experiment.config.recovery)
    silent = contextvars.copy_context()
    silent.run(told.set, False)
    with TRACING:
        traced = functools.partial(step, across=Across())
        return silent.run(program.trace, traced, state, fed)


def written_out(config: ExperimentConfig) -> bool:
    """Is attention to be written out, for its products to be counted?"""
    return any(t.attention == "flash" for t in config.model.trunks().values())


def needed(
    config: ExperimentConfig, traced: Program, shape: Mapping[str, Any], rows: int
) -> Program:
    """The program whose FLOPs are counted: `traced`, with attention written out.

    `flash` visits blocks in loops, or in kernels that cannot be looked into: `dot`
    computes the same.
    """
    if not written_out(config):
        return traced
    experiment = countable(config)
    state = jax.eval_shape(experiment.make_state)
    return trace(experiment, state, shape, rows)


def countable(config: ExperimentConfig) -> Experiment:
    """The same, with attention written out and the layers of a cycle traced once."""
    config = copy.deepcopy(config)
    for trunk in config.model.trunks().values():
        trunk.remat = False
        # Traced faster; but patterns of what is trained may name layers.
        if config.optim.train == OptimConfig().train:
            trunk.scan_layers = trunk.num_layers % trunk.cycle() == 0
        if trunk.attention == "flash":
            trunk.attention = "dot"
            trunk.attention_options = ("scale", trunk.scale())
    return Experiment(config)


def seen(config: ExperimentConfig, shape: Mapping[str, Any]) -> program.Share:
    """(path, operation) -> the share of attention's products that a window leaves."""
    trunks = config.model.trunks().values()
    windowed = [t for t in trunks if any(t.windows) and t.attention in ("dot", "flash")]

    def share(path: str) -> float:
        found = re.search(r"layer_(\d+)/self_attention(?:/\w+,\w+->\w+)?$", path)
        if not windowed or not found:
            return 1.0
        trunk, names = windowed[0], path.split("/")
        window, _ = trunk.limits_of(int(found[1]))
        if not window:
            return 1.0
        length = shape["S" if "encoder" in names and "S" in shape else "L"]
        reach = trunk.reach(window)
        # Both sides, where the future is seen.
        return min(1.0, (reach if "decoder" in names else 2 * reach - 1) / length)

    return share


# Bytes of one device


def state_bytes(state: Any) -> dict[str, int]:
    """{group: bytes on one device} of an abstract state, exact."""
    found: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        group = GROUPS.get(path_name(path).split("/")[0], "other")
        found[group] = found.get(group, 0) + _shard_bytes(x)
    return {name: size for name, size in found.items() if size}


def _shard_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * program.item_size(x.dtype)


def checkpoint_bytes(state: Any) -> int:
    """Bytes of the arrays that a checkpoint holds."""
    stored = map(leaves.storage, leaves.flatten(state.replace(frozen={})).values())
    return sum(x.size * x.dtype.itemsize for x in stored)


def shares(state: Any) -> dict[tuple[int, ...], float]:
    """{shape: share on one device} of parameters, so of their gradients too.

    Also of one layer's of a scanned trunk, and as the matrix that products take.
    """
    found: dict[tuple[int, ...], float] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        share = _shard_bytes(x) / (x.size * x.dtype.itemsize or 1)
        scanned = "layers" in path_name(path).split("/")
        for shape in (x.shape, x.shape[1:]) if scanned else (x.shape,):
            for i in range(1, len(shape)):
                sides = math.prod(shape[:i]), math.prod(shape[i:])
                found |= dict.fromkeys((sides, sides[::-1], shape), share)
    return found


def device_size(
    shares: Mapping[tuple[int, ...], float], mesh: Mapping[str, int], value: Value
) -> int:
    """Bytes of an array of the step on one device; traced with that device's rows."""
    if value.shape in shares:
        return round(value.size * shares[value.shape])
    parts = mesh["sequence"]
    whole = value.scope.rpartition("/")[2] in WHOLE
    if kind_of(value.scope) in SPLIT_KINDS and not whole:
        parts *= mesh["tensor"]
    return value.size // parts if len(value.shape) > 1 else value.size


def gathered(state: Any) -> int:
    """Bytes of the largest parameter of a layer that is brought together for use."""
    most = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        if "fsdp" in str(getattr(x.sharding, "spec", "")):
            layers = x.shape[0] if "layers" in path_name(path).split("/") else 1
            most = max(most, x.size * x.dtype.itemsize // layers)
    return most


def name_of(value: Value) -> str:
    """'decoder/layer_3/feed_forward/up [768, 512] float32'."""
    where = value.scope or value.made_by
    return f"{where} {list(value.shape)} {value.dtype}"


# What is said


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a forecast is compared with; 0: unknown."""

    name: str  # of a device
    count: int
    memory: float  # bytes of a device that JAX takes
    peak: float  # FLOP/s of a device, for the dtype of the model
    utilisation: float = UTILISATION
    gpu: bool = False  # is `memory` a share of a GPU's?
    named: bool = False  # by the user; else these are the devices that are here

    def room(self) -> str:
        """'60.0 GB of H100, the share that JAX takes (...)'."""
        share = ", the share that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION)"
        return f"{shown(self.memory)} of {self.name}{share if self.gpu else ''}"


def hardware(
    config: ExperimentConfig,
    devices: Devices | None = None,
    memory: float = 0,
    utilisation: float = UTILISATION,
) -> Hardware:
    """`devices`, else those that JAX sees; `memory` of one, if it is given."""
    trunks, named = [*config.model.trunks().values()], bool(devices or memory)
    dtype = trunks[0].dtype if trunks else "float32"
    if devices is None:
        first, count = jax.local_devices()[0], jax.device_count()
        chip, name = chips.of_kind(first.device_kind), first.device_kind
        if not chip or first.memory_stats():
            memory = memory or chips.memory_of(first) / (1 if chip else count)
    else:
        chip, count, name = devices.chip, devices.count, devices.chip.name
    share = bool(chip and chip.gpu() and not memory)
    memory = memory or (chip.usable() if chip else 0)
    peak = chip.peak(dtype) if chip else 0
    return Hardware(name, count, memory, peak, utilisation, share, named)


def describe(config: ExperimentConfig, on: Hardware) -> str:
    """Memory, FLOPs, time and checkpoints of a resolved config, and whether it fits."""
    found = of(config)
    held = {name: size for name, size in found.state.items() if size > 1000}
    parts = [f"{name} {shown(size)}" for name, size in held.items()]
    parts += [f"batch {shown(found.batch)}", f"step {shown(found.step)}"]
    lines = [f"memory a device: {shown(found.total())}: {', '.join(parts)}"]
    lines.append("largest arrays of the step:")
    lines += [f"  {name} {shown(size)}" for name, size in found.largest]
    if on.memory:
        lines += fits(config, found, on)
    lines += [flops_line(found), time_line(config, found, on)]
    kept = config.checkpoint.keep_newest + config.checkpoint.keep_best
    lines.append(
        f"checkpoint: {shown(found.checkpoint)}, up to {kept} are kept: "
        f"{shown(kept * found.checkpoint)}"
    )
    return "\n".join(line for line in lines if line)


def flops_line(found: Forecast) -> str:
    """'FLOPs a step: 3.97 GFLOP (feed-forward 61%, ...)'."""
    total = sum(found.flops.values())
    if not total:
        return ""
    kinds = sorted(found.flops.items(), key=lambda item: -item[1])
    shares_ = ", ".join(f"{kind} {n / total:.0%}" for kind, n in kinds)
    again = f"; remat computes {scaled(found.again)}FLOP again" if found.again else ""
    least = "at least " if found.open_loops else ""
    return f"matrix products a step: {least}{scaled(total)}FLOP ({shares_}){again}"


def seconds(found: Forecast, on: Hardware) -> float:
    """Of a step at the assumed utilisation; 0 if no peak is known."""
    peak = on.count * on.peak * on.utilisation
    return sum(found.flops.values()) / peak if peak else 0.0


def time_line(config: ExperimentConfig, found: Forecast, on: Hardware) -> str:
    """Seconds of a step and hours of the run at the assumed utilisation."""
    each = seconds(found, on)
    if not each:
        return (
            f"time: no peak FLOP/s of {on.name} is known for products of this dtype; "
            "the first steps tell"
        )
    hours = each * config.steps / 3600
    return (
        f"time: {hours:,.2f} hours, {each:.4f} s a step, if {on.utilisation:.0%} of "
        f"{on.count} x {scaled(on.peak)}FLOP/s are reached (--utilisation)"
    )


def fits(config: ExperimentConfig, found: Forecast, on: Hardware) -> list[str]:
    """Whether it fits, the largest micro-batch that does, or what to change."""
    if found.total() > on.memory:
        head = f"does not fit: {shown(found.total())} in {on.room()}"
        return [head, *remedies(config, found, on)]
    told = f"fits: {found.total() / on.memory:.1%} of {on.room()}"
    if not on.named:
        return [told]
    one = of(config, rows=1 if found.rows > 1 else 2)
    each = (found.step + found.batch - one.step - one.batch) / (found.rows - one.rows)
    spare = on.memory - found.total()
    most = found.rows + int(spare / each) if each > 0 else found.rows
    return [
        f"{told}; largest micro-batch a device: about {most:,} rows (now "
        f"{found.rows:,})"
    ]


def remedies(config: ExperimentConfig, found: Forecast, on: Hardware) -> list[str]:
    """Settings that need less, each with those before it, until it fits."""
    said, needs = [], found.total()
    for change in _changes(found, on):
        config = copy.deepcopy(config)
        keys = change(config)
        if not keys:
            continue
        try:
            needs = of(config).total()
        except UserError:  # such a mesh is not possible here
            continue
        told = " ".join(f"--config.{key}" for key in keys)
        said.append(f"  {'and ' if said else ''}{told}: {shown(needs)}")
        if needs <= on.memory:
            said[-1] += ", fits"
            return said
    return [*said, "  and more devices, or a smaller model"]


def _changes(
    found: Forecast, on: Hardware
) -> list[Callable[[ExperimentConfig], list[str]]]:
    """Functions that change a config and return the keys; none if it is so already."""

    def trunks(c: ExperimentConfig, name: str, old: Any, new: Any) -> list[str]:
        chosen = {k: t for k, t in c.model.trunks().items() if getattr(t, name) == old}
        for trunk in chosen.values():
            setattr(trunk, name, new)
        return [f"model.{k}.{name}={new}" for k in chosen]

    def flash(c: ExperimentConfig) -> list[str]:
        return trunks(c, "attention", "dot", "flash")

    def logits(c: ExperimentConfig) -> list[str]:
        if "vocab_size" not in c.model.outputs().values():
            return []
        return trunks(c, "logit_chunks", 1, 8)

    def remat(c: ExperimentConfig) -> list[str]:
        return trunks(c, "remat", False, True)

    def split(c: ExperimentConfig) -> list[str]:
        rest = c.mesh.tensor * c.mesh.sequence
        if c.placement != "mesh" or c.mesh.fsdp > 1 or on.count == rest:
            return []
        c.mesh.data, c.mesh.fsdp = 1, on.count // rest
        return ["mesh.data=1", f"mesh.fsdp={c.mesh.fsdp}"]

    def accumulate(c: ExperimentConfig) -> list[str]:
        now = of(c)
        spare = on.memory - sum(now.state.values())
        most = 2 ** int(math.log2(now.rows))
        times = 2 ** math.ceil(math.log2(max(2, now.step / max(1, spare))))
        if most == 1:
            return []
        c.optim.accumulate *= min(times, most)
        return [f"optim.accumulate={c.optim.accumulate}"]

    most_is_state = sum(found.state.values()) > on.memory / 2
    steps = [flash, logits, remat, accumulate]
    return [split, *steps] if most_is_state else [*steps, split]


# Compiled


def compiled(experiment: Experiment) -> Step:
    """The step for the longest rows, compiled from shapes for the devices of JAX."""
    placement, config = experiment.placement, experiment.config
    state = placement.abstract(jax.eval_shape(experiment.make_state))
    if config.placement == "pmap":
        state = jax.eval_shape(placement.load, state)
    batch = placement.abstract_batch(
        experiment.empty_batch(longest(config)),
        experiment.axes(),
        config.optim.accumulate,
    )
    step = guard.guarded(experiment.train_step, config.recovery)
    return placement.compile_train(step, state, guard.feed(placement, batch, 1, 0.0))


def compiled_bytes(step: Step) -> tuple[int, int]:
    """(bytes of state and batch, bytes beside them) of one device; 0 if not told."""
    found = step.compiled.memory_analysis()
    if found is None:
        return 0, 0
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes, found.temp_size_in_bytes + made


def compiled_line(step: Step) -> str:
    """What the compiled step needs of a device."""
    held, more = compiled_bytes(step)
    return (
        f"compiled step: {shown(held + more)} a device: state and batch {shown(held)}, "
        f"step {shown(more)}"
    )


def flops_of(experiment: Experiment, step: Step, shape: Mapping[str, Any]) -> int:
    """FLOPs that the model needs in a compiled step for rows of this shape."""
    config = experiment.config
    if step.jaxpr is not None and not written_out(config):
        # Of all devices together.
        traced = program.read(step.jaxpr.jaxpr)
        return traced.flops(again=False, share=seen(config, shape)).total()
    rows, state = local_rows(experiment, shape), jax.eval_shape(experiment.make_state)
    traced = None if written_out(config) else trace(experiment, state, shape, rows)
    return sum(step_flops(experiment, traced, shape, rows)[0].values())
