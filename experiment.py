"""What one config means: placement, model, task, optimiser, state and pure steps."""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from triform import models, tasks
from triform.configs import plugins
from triform.configs.schema import ExperimentConfig
from triform.data import batch as batches
from triform.runtime import norms, optim
from triform.runtime.errors import UserError
from triform.runtime.metrics import Mean, Metrics
from triform.runtime.parameters import ROWS
from triform.runtime.partition import PLACEMENTS, Across
from triform.tasks import Context

Array = jax.Array
Tree = Any


@struct.dataclass
class TrainState:
    """All that training reads or changes; arrays only."""

    step: Array  # int32 []: updates done
    params: Tree  # differentiated, and saved at every checkpoint
    frozen: Tree  # parameters that the forward pass reads only; saved once
    extra: Tree  # collections that modules write, e.g. running statistics
    opt_state: Tree
    rng: Array  # key; step t uses fold_in(rng, t)

    def variables(self, params: Tree | None = None) -> Tree:
        """What a model is applied to; `params` in place of the trained ones."""
        trained = self.params if params is None else params
        return {"params": optim.join(trained, self.frozen), **self.extra}


@dataclasses.dataclass
class Experiment:
    """The objects of one run, built from its config; nothing here touches data."""

    config: ExperimentConfig

    def __post_init__(self) -> None:
        config = self.config
        plugins.load_all(config)
        rows = (*config.model.PARAMETERS, *ROWS)
        try:
            config.validate()
            self.placement = PLACEMENTS[config.placement](config.mesh, rows=rows)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.spec, self.sizes = config.data.spec(), config.model.sizes()
        self._build()

    def _build(self) -> None:
        config, rows = self.config, (*self.config.model.PARAMETERS, *ROWS)
        self.model = models.build(config.model)
        self.task = tasks.build(config.task, self.model)
        self.optimizer = optim.build(config.optim, config.steps, rows)
        self.schedule = optim.learning_rate(config.optim, config.steps)

    def with_values(self, values: Mapping[str, Any]) -> "Experiment":
        """The same with other values, {'optim.learning_rate': x}, which are not checked
        and may be traced: its steps compute what an experiment with these numbers does.
        """
        other = copy.copy(self)
        other.config = copy.deepcopy(self.config)
        for key, value in values.items():
            *path, name = key.split(".")
            setattr(functools.reduce(getattr, path, other.config), name, value)
        other._build()
        return other

    # State

    def make_state(self) -> TrainState:
        """The initial state, a pure function of the seed."""
        return self.state_of(self.init_variables())

    def state_of(self, variables: Tree) -> TrainState:
        """The state of a run that starts from these variables."""
        params, frozen = optim.partition(variables["params"], self.config.optim.train)
        extra = {k: v for k, v in variables.items() if k != "params"}
        step, rng = jnp.zeros((), jnp.int32), jax.random.key(self.config.seed)
        return TrainState(step, params, frozen, extra, self.optimizer.init(params), rng)

    def init_variables(self) -> Tree:
        """Fresh parameters and collections, a pure function of the seed."""
        # Shapes of parameters do not depend on the batch's: one short row is enough.
        batch = self.empty_batch(self.config.data.shapes()[0], rows=1)
        rng = jax.random.key(self.config.seed)
        return self.task.init(jax.random.fold_in(rng, 2**31), batch)

    def abstract_state(self) -> TrainState:
        """Shapes and placement of the state as it is saved."""
        return self.placement.abstract(jax.eval_shape(self.make_state))

    def evaluation_variables(self, state: TrainState) -> Tree:
        """What evaluation uses: the moving average of parameters if there is one."""
        return state.variables(optim.evaluation_params(state.params, state.opt_state))

    # Batches

    def empty_batch(self, shape: batches.Shape, rows: int = 0) -> dict[str, np.ndarray]:
        """A batch of zeros; 0 rows: as many as a training batch of this shape has."""
        sizes = batches.resolved(shape, self.sizes)
        rows = rows or self.config.data.rows(shape)
        return batches.zeros(self.spec, {"B": rows, **sizes})

    def put(
        self, batch: Mapping[str, np.ndarray], total: int = 0, parts: int = 0
    ) -> Tree:
        """A batch on the devices, its rows padded to what steps need.

        All of its rows, or of `total` those that are `held` here. `parts`: micro-
        batches; 0: as many as training has.
        """
        parts = parts or self.config.optim.accumulate
        return self.placement.put(batch, self.axes(), parts, total)

    def rows(self, index: int) -> int:
        """Rows of a batch of the shape of this index, on all processes together."""
        return self.config.data.rows(self.config.data.shapes()[index])

    def held(self, index: int, parts: int = 0) -> slice:
        """Which of these this process makes; `parts` as in `put`."""
        parts = parts or self.config.optim.accumulate
        return self.placement.held(self.rows(index), parts)

    def axes(self) -> dict[str, str]:
        """Field of a batch -> its axes."""
        return {name: field.axes for name, field in self.spec.items()}

    def longest_target(self) -> int:
        """Target positions of the longest row of the data."""
        return max(shape["L"] for shape in self.config.data.shapes())

    # Steps

    def train_step(
        self, state: TrainState, batch: Tree, across: Across
    ) -> tuple[TrainState, Metrics]:
        """One update, pure. Denominators first: gradients of parts are then added."""
        task, k = self.task, self.config.optim.accumulate
        weights = across.sum(task.weights(batch))
        factors = dict.fromkeys(weights, 1.0) | task.coefficients(state.step)
        scale = {
            name: factors[name] / jnp.maximum(weights[name], 1e-8) for name in weights
        }

        def objective(params: Tree, extra: Tree, micro: Tree, i: Array) -> tuple:
            ctx = self.context(state, across, i)
            variables = {"params": optim.join(params, state.frozen), **extra}
            outputs, extra = task.outputs(variables, micro, ctx)
            with jax.named_scope("loss"):
                totals = task.terms(outputs, micro, ctx)
                measured = task.metrics(outputs, micro, ctx)
            loss = sum(scale[name] * totals[name] for name in scale)
            return loss, ((totals, measured), extra)

        gradient = jax.grad(objective, has_aux=True)
        if k == 1:
            grads, (sums, extra) = gradient(
                state.params, state.extra, batch, jnp.int32(0)
            )
        else:
            grads, sums, extra = self._accumulated(gradient, state, batch)
        grads, (totals, measured) = across.sum((grads, sums))
        with jax.named_scope("optimiser"):
            updates, opt_state = self.optimizer.update(
                grads, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
        one = jnp.float32(1)
        measured = dict(measured)
        if len(weights) > 1:
            measured |= {f"{n}_loss": Mean(totals[n], weights[n]) for n in weights}
        loss = sum(scale[name] * totals[name] for name in scale)
        measured["loss"] = Mean(loss, one)
        measured["grad_norm"] = Mean(optax.tree.norm(grads), one)
        if self.config.log_norms:
            found = norms.of_step(grads, state.params, updates)
            measured |= {name: Mean(norm, one) for name, norm in found.items()}
        state = state.replace(
            step=state.step + 1,
            params=params,
            extra=across.mean(extra),
            opt_state=opt_state,
        )
        return state, measured

    def context(self, state: TrainState, across: Across, i: Array | int) -> Context:
        """What micro-batch i of a training step is computed with."""
        rng = jax.random.fold_in(state.rng, state.step)
        stream = jax.random.fold_in(jax.random.fold_in(rng, across.index), i)
        rngs = {"dropout": stream, "sample": jax.random.fold_in(stream, 1)}
        return Context(state.step, rngs, True, across.rows)

    def micros(self, batch: Tree) -> Tree:
        """The micro-batches of a batch, on a leading axis."""
        k = self.config.optim.accumulate
        # Strided rows, so that a row stays on its device.
        return jax.tree.map(
            lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), batch
        )

    def _accumulated(self, gradient: Any, state: TrainState, batch: Tree) -> tuple:
        """(gradients, sums, extra) of all micro-batches, one after another."""
        k, micros = self.config.optim.accumulate, self.micros(batch)

        def accumulate(carry: tuple, micro: tuple) -> tuple[tuple, None]:
            summed, extra = carry
            grads, (sums, extra) = gradient(state.params, extra, *micro)
            return (jax.tree.map(jnp.add, summed, (grads, sums)), extra), None

        first = jax.tree.map(lambda x: x[0], micros)
        grads, (sums, _) = jax.eval_shape(
            gradient, state.params, state.extra, first, jnp.int32(0)
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, sums))
        carry, _ = jax.lax.scan(
            accumulate, (zeros, state.extra), (micros, jnp.arange(k))
        )
        (grads, sums), extra = carry
        return grads, sums, extra

    def eval_step(
        self, variables: Tree, step: Array, batch: Tree, across: Across
    ) -> tuple[Metrics, Mapping[str, Array]]:
        """(sums and weights of every term and metric, predictions [B, ...]), pure."""
        task, ctx = self.task, Context(step, {}, False, across.rows)
        outputs, _ = task.outputs(variables, batch, ctx)
        weights, totals = task.weights(batch), task.terms(outputs, batch, ctx)
        terms = {name: Mean(totals[name], weights[name]) for name in weights}
        measured = {"terms": terms, **task.metrics(outputs, batch, ctx)}
        return across.sum(measured), task.predict(outputs, batch)

    def predict_step(
        self, variables: Tree, step: Array, batch: Tree, across: Across
    ) -> tuple[Metrics, Mapping[str, Array]]:
        """({}, the task's answers [B, ...]) for rows without truth, pure."""
        ctx = Context(step, {}, False, across.rows)
        outputs, _ = self.task.outputs(variables, batch, ctx)
        return {}, self.task.answer(outputs, batch)

    def values(self, measured: Mapping[str, Any], step: int) -> dict[str, float]:
        """{name: value} of what evaluation summed; `loss`: the objective at `step`.

        A term that nothing counts for adds nothing, as in training, and has no value.
        """
        counted = {k: m for k, m in measured["terms"].items() if m.weight > 0}
        counted = counted or measured["terms"]
        terms = {name: m.value() for name, m in counted.items()}
        factors = dict.fromkeys(terms, 1.0) | dict(self.task.coefficients(step))
        found = {k: m.value() for k, m in measured.items() if k != "terms"}
        if len(measured["terms"]) > 1:
            found |= {f"{name}_loss": value for name, value in terms.items()}
        loss = sum(float(factors[name]) * value for name, value in terms.items())
        return found | {"loss": loss}
