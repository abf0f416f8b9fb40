"""Capsules: what is needed to see a bad step again, on one CPU, without the data.

WORKDIR/capsules/step_N holds capsule.json (why it was bad, the examples, norms), the
batch, the config and, in checkpoints/, the state that the step was computed from,
without the optimiser's moments.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from triform import workdir as workdirs
from triform.experiment import Experiment, TrainState
from triform.input_pipeline import TrainBatches
from triform.runtime import commands, files, guard, hosts, metrics, paths, stores
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import CheckpointError, UserError
from triform.runtime.first_nonfinite import first_nonfinite
from triform.runtime.partition import Across, MeshConfig

FILE = "capsule.json"


def path_of(workdir: str, step: int) -> str:
    """The folder of a bad step's capsule."""
    return os.path.join(workdir, "capsules", f"step_{step}")


def write(
    experiment: Experiment,
    workdir: str,
    step: int,
    state: TrainState,
    batch: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> str:
    """Writes the capsule of a step; what to tell of it.

    `state` is the one that the step was computed from, placed. That a capsule cannot be
    written hides nothing: the reason is told in its place.
    """
    folder, config = path_of(workdir, step), experiment.config
    saved = experiment.placement.unload(state).replace(opt_state={})
    arrays = jax.tree.leaves(saved.variables())
    size = sum(x.nbytes for x in arrays)
    facts = {"step": step, "bytes": size, **facts, "norms": norms(saved.params)}
    problem = ""
    try:
        if hosts.here().is_first:
            files.remove_folder(folder)
            files.make_folder(folder)
            with files.replacing(os.path.join(folder, "batch.npz"), binary=True) as f:
                np.savez(f, **batch)
            workdirs.claim(folder, config, {})
            files.write_json(os.path.join(folder, FILE), facts)
    except OSError as error:
        problem = str(error)
    if problem := hosts.here().broadcast("writing a capsule", problem):
        return f"its capsule could not be written ({problem})"
    try:
        where = workdirs.checkpoint_dir(folder)
        with Checkpointer(where, CheckpointConfig()) as checkpointer:
            checkpointer.save(step, saved, meta={}, wait=True)
    except (OSError, CheckpointError) as error:
        return f"its capsule could not be written ({error})"
    again = commands.line("tools", "replay", commands.path(folder))
    return f"to see it again: {again}"


def keep(
    experiment: Experiment,
    train: TrainBatches,
    workdir: str,
    watch: guard.Watch,
    step: int,
    facts: Mapping[str, Any],
    state: TrainState,
) -> str:
    """What to tell of a bad step: the first module that failed, and its capsule."""
    number = watch.position(step - 1)
    batch, first = train[number], ""
    if not np.isfinite(facts["measured"]["train/loss"]):
        first = named(experiment, state, experiment.put(batch))
    facts = {**facts, "batch": number, "first": first.removeprefix(", first in ")}
    return f"{first}; {write(experiment, workdir, step, state, batch, facts)}"


def norms(params: Any) -> dict[str, float]:
    """Euclidean norm of every parameter by path, float32."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    found = jax.jit(lambda xs: [_norm(x) for x in xs])([x for _, x in flat])
    names = [paths.path_name(path) for path, _ in flat]
    return {k: float(x) for k, x in zip(names, found, strict=True)}


def _norm(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32).reshape(-1)
    # Squares of what is large and finite would not be.
    most = jnp.abs(x).max(initial=0.0)
    scale = jnp.where(jnp.isfinite(most) & (most > 0), most, 1.0)
    return scale * jnp.linalg.norm(x / scale)


def first_bad(experiment: Experiment, state: TrainState, batch: Any) -> str:
    """Name of the first module whose output is not finite in this step, or ''.

    `batch` as steps take it on a mesh; slow, operation by operation.
    """
    k, batch = experiment.config.optim.accumulate, dict(batch)
    task = _without_remat(experiment).task
    micros = experiment.micros(batch) if k > 1 else None

    def forward() -> None:
        for i in range(k):
            micro = jax.tree.map(lambda x, i=i: x[i], micros) if k > 1 else batch
            ctx = experiment.context(state, Across(), i)
            task.outputs(state.variables(), micro, ctx)

    return first_nonfinite(forward)


def _without_remat(experiment: Experiment) -> Experiment:
    """The same numbers, and all modules can be looked into."""
    names = [f"model.{name}.remat" for name in experiment.config.model.trunks()]
    return experiment.with_values(dict.fromkeys(names, False))


def named(experiment: Experiment, state: TrainState, batch: Any) -> str:
    """', first in MODULE' for a message; '' where it cannot be found out here."""
    if jax.process_count() > 1 or experiment.config.placement != "mesh":
        return ""  # the capsule can be replayed anywhere
    with contextlib.suppress(Exception):  # must not hide what went wrong
        if name := first_bad(experiment, state, batch):
            return f", first in {name}"
    return ""


def replay(folder: str) -> str:
    """Computes the bad step of a capsule again, on one device; the report.

    UserError if it is no capsule.
    """
    folder = paths.workdir(folder)
    text = files.read_text(os.path.join(folder, FILE))
    if text is None:
        raise UserError(
            f"{folder}: holds no {FILE}; name a folder of WORKDIR/capsules/"
        )
    facts = json.loads(text)
    config = workdirs.open_config(folder)
    config.placement, config.mesh = "mesh", MeshConfig()
    experiment = Experiment(config)
    with Checkpointer(workdirs.checkpoint_dir(folder), CheckpointConfig()) as kept:
        wanted = experiment.abstract_state().replace(opt_state={})
        state, _ = kept.restore(wanted, facts["step"])
    with np.load(os.path.join(stores.local(folder), "batch.npz")) as arrays:
        batch = experiment.put(dict(arrays))
    full = state.replace(opt_state=experiment.optimizer.init(state.params))
    step = jax.jit(lambda state, batch: experiment.train_step(state, batch, Across()))
    _, measured = step(full, batch)
    now = metrics.values(metrics.to_host(measured), "train")
    lines = [f"step {facts['step']}: {facts['why']}", f"examples: {facts['examples']}"]
    for name in ("train/loss", "train/grad_norm"):
        lines.append(f"{name}: {now[name]} here, {facts['measured'][name]} in the run")
    bad = [k for k, x in facts["norms"].items() if not np.isfinite(float(x))]
    lines += [f"parameters that are not finite: {', '.join(bad)}"] if bad else []
    found = first_bad(experiment, state, batch)
    lines.append(
        f"first module whose output is not finite: {found or 'none'}"
        + ("" if found else "; the loss, its gradient or the update is not, or jumps")
    )
    return "\n".join(lines)
