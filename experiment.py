"""What one config means: placement, model, task, optimiser, state and pure steps."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from triform import models, tasks
from triform.configs.schema import ExperimentConfig, from_json
from triform.data import datasets
from triform.runtime import metrics, optim
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.metrics import Mean
from triform.runtime.partition import PLACEMENTS

Array = jax.Array
Tree = Any


@struct.dataclass
class TrainState:
    """All that training changes; arrays only."""

    step: Array  # int32 []: updates done
    params: Tree
    opt_state: Tree
    rng: Array  # key; step t uses fold_in(rng, t)


@dataclasses.dataclass
class Experiment:
    """The objects of one run, built from its config; nothing here touches data."""

    config: ExperimentConfig

    def __post_init__(self) -> None:
        config = self.config
        try:
            config.validate()
            self.placement = PLACEMENTS[config.placement](config.mesh)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.model = models.build(config.model)
        self.task = tasks.build(config.task, self.model)
        self.optimizer = optim.build(config.optim, config.steps)
        self.schedule = optim.learning_rate(config.optim, config.steps)

    def make_state(self) -> TrainState:
        """The initial state, a pure function of the seed."""
        return self.state_of(self.init_params())

    def state_of(self, params: Tree) -> TrainState:
        """The state of a run that starts from these parameters."""
        step, rng = jnp.zeros((), jnp.int32), jax.random.key(self.config.seed)
        return TrainState(step, params, self.optimizer.init(params), rng)

    def init_params(self) -> Tree:
        """Fresh parameters, a pure function of the seed."""
        # Shapes of parameters do not depend on the batch's: one short row is enough.
        batch = self.empty_batch(rows=1, length=self.config.data.lengths()[0])
        rng = jax.random.key(self.config.seed)
        return self.task.init(jax.random.fold_in(rng, 2**31), batch)

    def empty_batch(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """What every batch of the data holds, zero."""
        config = self.config
        return datasets.empty(config.data, rows, length, config.model.limits())

    def abstract_state(self) -> TrainState:
        """Shapes and placement of the state as it is saved."""
        return self.placement.abstract(jax.eval_shape(self.make_state))

    def train_step(
        self,
        state: TrainState,
        batch: Tree,
        reduce: Callable[[Tree], Tree],
        part: Array | int,
    ) -> tuple[TrainState, dict[str, Mean]]:
        """One update, pure; for `reduce` and `part` see runtime/partition.py.

        Totals are summed over micro-batches and devices, then divided once:
        accumulation and uneven rows are exact.
        """
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), part)

        def total_loss(params: Tree, part: Tree, i: Array) -> tuple[Array, tuple]:
            loss, measured = self.task.loss(
                params, part, jax.random.fold_in(rng, i), True
            )
            return loss.total, (loss.weight, measured)

        gradient = jax.grad(total_loss, has_aux=True)
        k = self.config.optim.accumulate
        if k == 1:
            summed = gradient(state.params, batch, jnp.int32(0))
        else:
            # Strided rows, so that a row stays on its device.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), batch
            )

            def accumulate(so_far: Tree, part: tuple) -> tuple[Tree, None]:
                new = gradient(state.params, *part)
                return jax.tree.map(jnp.add, so_far, new), None

            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(gradient, state.params, first, jnp.int32(0))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            summed, _ = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(k)))
        grads, (weight, measured) = reduce(summed)
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-8), grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        measured["grad_norm"] = Mean(optax.tree.norm(grads), jnp.float32(1))
        return TrainState(state.step + 1, params, opt_state, state.rng), measured

    def eval_step(
        self, params: Tree, batch: Tree, reduce: Callable[[Tree], Tree]
    ) -> metrics.Metrics:
        """Sums and weights of every metric over a batch, pure."""
        return reduce(self.task.loss(params, batch, None, False)[1])

    def put(self, batch: dict[str, np.ndarray]) -> Tree:
        """A batch on the devices, its rows padded to what steps need."""
        return self.placement.put(batch, self.config.optim.accumulate)

    def evaluation_params(self, state: TrainState) -> Tree:
        """The parameters that evaluation uses: the moving average if there is one."""
        return optim.evaluation_params(state.params, state.opt_state)

    def load_params(self, checkpointer: Checkpointer, which: str) -> tuple[Tree, str]:
        """Parameters of 'best', 'latest', 'average:K' (newest K) or a step number.

        Returns them placed, with a description of what was loaded.
        """
        kept = checkpointer.steps()
        if not kept:
            raise UserError(
                f"{checkpointer.directory}: no checkpoint yet; train first, or name "
                "another workdir"
            )
        kind, _, count = which.partition(":")
        if kind == "average" and count.isdigit() and int(count) > 0:
            # Older ones are kept for being best, not for being next in line.
            near = checkpointer.on_schedule()[-self.config.checkpoint.keep_newest :]
            steps = near[-int(count) :]
            if len(steps) < int(count):
                raise UserError(
                    f"checkpoint={which!r}: only {len(near)} consecutive checkpoints "
                    f"are there ({', '.join(map(str, near))}); average at most so many"
                )
        elif which == "best":
            best = checkpointer.best()
            steps = [kept[-1] if best is None else best]
        elif which == "latest":
            steps = kept[-1:]
        elif which.isdigit() and int(which) in kept:
            steps = [int(which)]
        else:
            raise UserError(
                f"checkpoint={which!r}: expected best, latest, average:K or one of the "
                f"steps {', '.join(map(str, kept))}"
            )
        total = None
        for step in steps:
            try:
                params = self._saved_params(checkpointer, step)
            except FileNotFoundError as error:
                raise UserError(
                    f"checkpoint {step} was removed by its run while it was read; try "
                    "again"
                ) from error
            total = params if total is None else jax.tree.map(jnp.add, total, params)
        mean = jax.tree.map(lambda x: (x / len(steps)).astype(x.dtype), total)
        name = f"step {steps[0]}" if len(steps) == 1 else f"mean of steps {steps}"
        return self.placement.load(mean), name

    def _saved_params(self, checkpointer: Checkpointer, step: int) -> Tree:
        abstract = self.abstract_state()
        if not self.config.optim.ema_decay:
            return checkpointer.restore_params(abstract.params, step)
        state, _ = checkpointer.restore(abstract, step)
        return self.evaluation_params(state)


def saved_config(workdir: str) -> ExperimentConfig | None:
    """The config of a workdir; None if it holds none."""
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        return None
    with open(path) as f:
        text = f.read()
    try:
        return from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a config of this version of Triform ({error!r}); restore the "
            "file or name another workdir"
        ) from error


def open_workdir(workdir: str) -> ExperimentConfig:
    """The config of a workdir that must exist; UserError if it does not."""
    config = saved_config(workdir)
    if config is None:
        raise UserError(
            f"workdir={workdir!r}: holds no config.json; name the workdir of a run "
            "that train.py has started"
        )
    return config


def for_these_devices(config: ExperimentConfig) -> ExperimentConfig:
    """The config with its mesh, or with the batch split over all devices if not so many
    are here as it was trained on.
    """
    try:
        config.mesh.sizes(jax.device_count())
    except ValueError:
        config.mesh = type(config.mesh)()
    config.placement = "mesh"
    return config


def checkpoint_dir(workdir: str) -> str:
    """Where a workdir's checkpoints are."""
    return os.path.join(workdir, "checkpoints")
