"""Starting from parameters of another run: fine-tuning, imported weights."""

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np

from triform.experiment import (
    Experiment,
    checkpoint_dir,
    for_these_devices,
    open_workdir,
)
from triform.models.transformer import cycle, looped_layers, stacked_layers
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.paths import path_name

Tree = Any
Shape = tuple[int, ...]


@dataclasses.dataclass
class Report:
    """What became of every array, by name with its shape (saved, then wanted)."""

    source: str
    restored: dict[str, Shape]
    adapted: dict[str, tuple[Shape, Shape]]
    copied: dict[str, str]  # from an array that is also restored, by its name
    skipped: dict[str, Shape]
    new: dict[str, Shape]

    def __str__(self) -> str:
        def size(shapes: Any) -> str:
            return f"{sum(int(np.prod(s)) for s in shapes):,} parameters"

        def lines(names: dict[str, Any]) -> list[str]:
            return [f"    {name} {shape}" for name, shape in names.items()]

        changed = {k: f"{old} -> {new}" for k, (old, new) in self.adapted.items()}
        return "\n".join(
            [
                f"init_from: {self.source}",
                f"  restored: {len(self.restored)} arrays, "
                f"{size(self.restored.values())}",
                *(["  restored in another shape:"] if changed else []),
                *lines(changed),
                *(["  copied:"] if self.copied else []),
                *(f"    {name} from {origin}" for name, origin in self.copied.items()),
                f"  skipped: {len(self.skipped)} saved arrays without a place, "
                f"{size(self.skipped.values())}",
                *lines(self.skipped),
                f"  newly initialised: {len(self.new)} arrays, "
                f"{size(self.new.values())}",
                *lines(self.new),
            ]
        )


def parse(init_from: str) -> tuple[str, str]:
    """(workdir, which checkpoint) of WORKDIR or WORKDIR:best|latest|average:K|STEP.

    UserError if there is no such workdir.
    """
    found = re.fullmatch(r"(.+?)(?::(best|latest|average:\d+|\d+))?", init_from)
    workdir = os.path.abspath(found[1])
    if not os.path.isdir(workdir):
        raise UserError(f"init_from={init_from!r}: no such folder; name a workdir")
    return workdir, found[2] or "best"


def saved_params(init_from: str) -> tuple[Tree, str]:
    """Looped parameters on the host, and a description; UserError if there are none."""
    workdir, which = parse(init_from)
    config = for_these_devices(open_workdir(workdir))
    experiment = Experiment(config)
    with Checkpointer(checkpoint_dir(workdir), config.checkpoint) as checkpointer:
        params, found = experiment.load_params(checkpointer, which)
    return looped_layers(jax.device_get(params)), f"{workdir}, {found}"


def start(experiment: Experiment, init_from: str) -> tuple[Any, Report]:
    """(first state of a run with what fits of another's parameters, report), placed."""
    saved, source = saved_params(init_from)
    model = experiment.config.model
    if model.trunk.scan_layers:
        saved = stacked_layers(saved, cycle(model.trunk), np)
    saved = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(saved)}
    placement = experiment.placement
    shapes = jax.eval_shape(experiment.make_state)
    places = placement.shardings(shapes)
    params = jax.jit(experiment.init_params, out_shardings=places.params)()
    report = Report(source, {}, {}, {}, {}, {})

    def choose(path: tuple, fresh: jax.Array) -> jax.Array:
        name = path_name(path)
        origin = name if name in saved else model.origin(name)
        found = saved.get(origin)
        if found is not None and found.shape != fresh.shape:
            fitted = model.adapt(name, found, fresh.shape)
            if fitted is not None:
                report.adapted[name] = (found.shape, fresh.shape)
            found = fitted
        if found is None:
            report.new[name] = fresh.shape
            return fresh
        if origin != name:
            report.copied[name] = origin
        elif name not in report.adapted:
            report.restored[name] = fresh.shape
        return jax.device_put(np.asarray(found, fresh.dtype), fresh.sharding)

    params = jax.tree_util.tree_map_with_path(choose, params)
    used = report.restored.keys() | report.adapted.keys()
    report.skipped |= {k: x.shape for k, x in saved.items() if k not in used}
    if not used:
        raise UserError(
            f"init_from={init_from!r}: none of its {len(saved)} arrays has a place in "
            f"model={type(experiment.config.model).__name__}; name a workdir of the "
            "same family"
        )
    state = jax.jit(experiment.state_of, out_shardings=places)(params)
    return placement.load(state), report
