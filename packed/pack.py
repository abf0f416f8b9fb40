"""The programs of a pack, and the turns of its members."""

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from triform import train
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.experiment import Experiment, TrainState
from triform.packed import grouping
from triform.packed.grouping import matches
from triform.packed.members import Call, Held, Member, Shares
from triform.packed.sharing import Opened
from triform.runtime import guard, launch
from triform.runtime.errors import UserError
from triform.runtime.partition import Across, MeshPlacement, block_on_cpu, pad_rows
from triform.runtime.progress import stage
from triform.runtime.traced import Traced, stacked
from triform.runtime.turns import Turns

Tree = Any
Values = dict[str, Any]  # settings that differ, by key


class Pack:
    """Runs of one group, which are trained at once."""

    def __init__(
        self,
        members: Sequence[tuple[ExperimentConfig, str]],
        inputs: Sequence[str],
        stop: train.Stop,
    ):
        self.members, self._ask_stop, self.stopped = members, stop, ""
        trees = [schema.flat(config) for config, _ in members]
        self._inputs = {key: [tree[key] for tree in trees] for key in inputs}
        kept = [[t[k] for k in t if k.startswith(("data.", "eval"))] for t in trees]
        self._same_data = all(x == kept[0] for x in kept)
        self._data = Opened(len(members))
        self.turns = [
            Turns(name, functools.partial(self._train, index))
            for index, name in enumerate(_names([workdir for _, workdir in members]))
        ]
        self._members: dict[int, Member] = {}
        self._waiting: dict[int, Call] = {}
        self._made: dict[Any, Callable] = {}  # programs of init
        self._programs: dict[Any, Callable] = {}
        self._order: list[int] = []  # members that have a slot, in the order of slots
        self._abstract: Tree = None  # the state of one of them
        self._states: Tree = None  # [K, ...] of every leaf
        self._frozen: list[Tree] = []  # of every slot, and what programs get of them:
        self._frozen_inputs: tuple[Tree, Tree] = ({}, None)
        self._variables: tuple[list, Any] = ([], None)  # of the evaluation that goes on

    # Members

    def _train(self, index: int) -> dict[str, Any]:
        config, workdir = self.members[index]

        def make(config: ExperimentConfig) -> Experiment:
            self._members[index] = Member(config, self, index)
            return self._members[index]

        parts = train.Parts(make, self._data.codecs, self._data.splits)
        return train.run(config, workdir, stop=lambda: self.stopped, parts=parts)

    def ask(self, index: int, call: Call) -> Any:
        """From a member's thread: what its call gives, once it was computed."""
        return self.turns[index].ask(call)

    def named(self) -> list[tuple[Turns, str]]:
        """(turns, workdir) of every member."""
        workdirs = (workdir for _, workdir in self.members)
        return [*zip(self.turns, workdirs, strict=True)]

    def run(self) -> None:
        """Trains all members to their ends, or until `stop()`: see `turns`."""
        waiting = self._waiting
        ready: dict[int, tuple] = dict.fromkeys(range(len(self.turns)), ())
        try:
            while ready:
                for index, given in ready.items():
                    if not given:  # it has not begun
                        self.stopped = self.stopped or self._ask_stop()
                        if self.stopped:
                            continue
                    call = self.turns[index].go_on(*given)
                    if call is not None:
                        waiting[index] = call
                ready = self._compute() if waiting else {}
        finally:
            for turns in self.turns:
                turns.end()

    def _compute(self) -> dict[int, tuple]:
        """What the call gives that most wait for: (answer,) or (None, error) by member,
        who no longer wait.
        """
        waiting = self._waiting
        # Asked here only: members at the same step see the same, and leave after it.
        self.stopped = self.stopped or self._ask_stop()
        if not self._order:
            self._order = [*waiting]
            self._experiment = self._members[self._order[0]]
            self._alone = self._experiment.placement.alone
        calls: dict[tuple, dict[int, Call]] = {}
        for index, call in waiting.items():
            calls.setdefault(self._key(call), {})[self._order.index(index)] = call
        # The first training step waits for all: they share what is frozen.
        begun = self._abstract is not None
        key, chosen = max(
            calls.items(), key=lambda x: (begun or x[0][0] == "eval", len(x[1]))
        )
        perform = {"train": self._step, "eval": self._eval}
        try:
            answers = {s: (x,) for s, x in perform[key[0]](chosen).items()}
        except Exception as error:  # their states may be gone: nobody can go on
            told = self._told(error)
            answers = {self._order.index(i): (None, told) for i in waiting}
        found = {self._order[slot]: answer for slot, answer in answers.items()}
        for index in found:
            del waiting[index]
        return found

    def _key(self, call: Call) -> tuple:
        """Calls of one key are computed at once."""
        shared = self._shared(call.kind)
        return call.kind, call.about, shared and id(call.batch.rows)

    def _shared(self, kind: str) -> bool:
        """Do members have the same batches? Decided by their settings alone: a program
        of its own for those who happen to would make other roundings.
        """
        return self._same_data and (kind == "eval" or "seed" not in self._inputs)

    def _told(self, error: Exception) -> Exception:
        line = launch.one_line(error)
        if "out of memory" in line:
            line += f"; or train fewer than {len(self._order)} runs at once"
        return UserError(line) if line else error

    # Inputs

    def _with(self, experiment: Experiment, values: Values) -> Experiment:
        """The experiment with traced values."""
        asked = {k: matches(grouping.ASKED, k) for k in values}
        traced = {k: Traced(x) if asked[k] else x for k, x in values.items()}
        return experiment.with_values(traced)

    def _values(self, indices: Sequence[int]) -> Values:
        """{key: [K]} of these members."""

        def column(key: str) -> jax.Array:
            numbers = [self._inputs[key][i] for i in indices]
            return jnp.array(numbers, jnp.uint32) if key == "seed" else stacked(numbers)

        return {key: column(key) for key in self._inputs}

    def _batch(self, calls: Sequence[Call]) -> tuple[Tree, int | None]:
        """(batch on the devices, its axis of members, None if all have the same)."""
        first, alone, batches = calls[0].batch, self._alone, [x.batch for x in calls]
        if self._shared(calls[0].kind):
            rows = pad_rows(first.rows, alone.rows * first.parts)
            return alone.spread(rows, first.axes), None
        padded = [pad_rows(x.rows, alone.rows * x.parts) for x in batches]
        stacked = {k: np.stack([x[k] for x in padded]) for k in first.rows}
        return alone.spread(stacked, {k: f"K{x}" for k, x in first.axes.items()}), 0

    def _slots(self, calls: Mapping[int, Call]) -> list[Call]:
        """A call for every slot: who does not ask computes what another one asks for,
        and nobody reads it.
        """
        first = next(iter(calls.values()))
        return [calls.get(slot, first) for slot in range(len(self._order))]

    # The state

    def init(self, alone: MeshPlacement, index: int, make: Callable[[], Tree]) -> Tree:
        """The state that a member's `make` gives; compiled once for all members."""
        experiment, function = make.__self__, make.__func__

        def made(values: Values) -> Tree:
            return function(self._with(experiment, values))

        values = jax.tree.map(lambda x: x[0], self._values([index]))
        if function not in self._made:
            places = alone.shardings(jax.eval_shape(made, values))
            self._made[function] = jax.jit(made, out_shardings=places)
        return self._made[function](values)

    def _enter(self, states: dict[int, TrainState]) -> None:
        """Takes in the states of slots, which are donated."""
        structure = jax.tree.structure(self._abstract)
        # Where a setting is 0 alone, the optimiser may have one empty part less.
        own = {
            slot: jax.tree.unflatten(structure, _leaves(state))
            for slot, state in states.items()
        }
        if self._states is None:
            first = next(iter(own.values()))
            trees = [own.get(slot, first) for slot in range(len(self._order))]
            stack = jax.jit(_stacked, out_shardings=self._places())
            self._states = stack(trees)
        else:
            put = jax.jit(_replaced, donate_argnums=0, out_shardings=self._places())
            for slot, state in own.items():
                self._states = put(self._states, slot, state)
        jax.block_until_ready(self._states)
        for x in jax.tree.leaves(own):
            x.delete()

    def state_of(self, index: int) -> TrainState:
        """A copy of a member's state."""
        slot = self._order.index(index)
        if _taken not in self._made:
            places = jax.tree.map(lambda x: x.sharding, self._abstract)
            self._made[_taken] = jax.jit(_taken, out_shardings=places)
        state = self._made[_taken](self._states, slot)
        return state.replace(frozen=self._frozen[slot])

    def _places(self) -> Tree:
        """Shardings of the states of all slots."""

        def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
            return NamedSharding(self._alone.mesh, P(None, *x.sharding.spec))

        return jax.tree.map(place, self._abstract)

    # Training

    def _begin(self) -> None:
        """Finds out what the state is of, and what all have of it that is frozen."""

        def made(values: Values) -> TrainState:
            return self._with(self._experiment, values).make_state()

        values = jax.tree.map(lambda x: x[0], self._values(self._order[:1]))
        state = jax.eval_shape(made, values)
        self._abstract = self._alone.abstract(state.replace(frozen={}))
        first = next(iter(self._waiting.values()))
        held = [self._waiting.get(i, first).state.frozen for i in self._order]
        self._frozen = equal_ones_shared(held)
        self._frozen_inputs = joined(self._frozen, same_ones(self._frozen))

    def _program(self, call: Call, batch: Tree, axis: int | None) -> Callable:
        """The train step of all slots, compiled for batches of these shapes."""
        key = (call.batch.shapes(), axis)
        if key in self._programs:
            return self._programs[key]
        count = len(self._order)
        experiment = self._experiment
        frozen, axes = self._frozen_inputs

        def one(
            values: Values, state: TrainState, numbers: Tree, frozen: Tree, batch: Tree
        ) -> tuple:
            state = state.replace(frozen=frozen)
            traced = self._with(experiment, values)
            guarded = guard.guarded(traced.train_step, experiment.config.recovery)
            state, measured = guarded(state, {**numbers, "batch": batch}, Across())
            return state.replace(frozen={}), measured

        def step(
            values: Values,
            states: Tree,
            numbers: Tree,
            frozen: Tree,
            batch: Tree,
            active: jax.Array,
        ) -> tuple[Tree, Tree]:
            many = jax.vmap(one, in_axes=(0, 0, 0, axes, axis), axis_size=count)
            new, measured = many(values, states, numbers, frozen, batch)

            def chosen(new: jax.Array, old: jax.Array, place: Any) -> jax.Array:
                mask = active.reshape(count, *[1] * (old.ndim - 1))
                return jax.lax.with_sharding_constraint(
                    jnp.where(mask, new, old), place
                )

            return jax.tree.map(chosen, new, states, self._places()), measured

        def abstract(x: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=place)

        states = jax.tree.map(abstract, self._abstract, self._places())
        values, active = self._values(self._order), np.ones(count, bool)
        inputs = values, states, _numbers([call] * count), frozen, batch, active
        with stage(f"compiling the step of {count} runs"):
            compiled = jax.jit(step, donate_argnums=1).lower(*inputs).compile()
        self._programs[key] = functools.partial(compiled, values)
        return self._programs[key]

    def _step(self, calls: Mapping[int, Call]) -> dict[int, Tree]:
        self._variables = ([], None)
        slots = self._slots(calls)
        if self._abstract is None:
            self._begin()
        self._enter(
            {s: x.state for s, x in calls.items() if not isinstance(x.state, Held)}
        )
        batch, axis = self._batch(slots)
        active = np.array([slot in calls for slot in range(len(slots))])
        program = self._program(slots[0], batch, axis)
        fixed = self._frozen_inputs[0]
        found = program(self._states, _numbers(slots), fixed, batch, active)
        self._states, measured = block_on_cpu(found)
        shares = Shares(measured)
        return {slot: shares.of(slot) for slot in calls}

    # Evaluation

    def _eval(self, calls: Mapping[int, Call]) -> dict[int, Tree]:
        first, slots = next(iter(calls.values())), self._slots(calls)
        experiment = self._experiment
        trees = [x.state for x in slots]
        if [*map(id, trees)] != [*map(id, self._variables[0])]:
            self._variables = (trees, joined(trees, same_ones(self._frozen)))
        (variables, axes), count = self._variables[1], len(slots)
        batch, axis = self._batch(slots)
        function = first.about[0]
        key = (first.about, axis, str(axes))
        if key not in self._made:

            def one(values: Values, variables: Tree, number: Any, batch: Tree) -> Tree:
                traced = self._with(experiment, values)
                return function(traced, variables, number, batch, Across())

            many = jax.vmap(one, in_axes=(0, axes, 0, axis), axis_size=count)
            self._made[key] = jax.jit(many)
        numbers = np.array([x.step for x in slots], np.int32)
        values = self._values(self._order)
        shares = Shares(self._made[key](values, variables, numbers, batch))
        leaves = shares.leaves()
        return {
            slot: jax.tree.unflatten(shares.structure, [x[slot] for x in leaves])
            for slot in calls
        }


def _names(workdirs: Sequence[str]) -> Sequence[str]:
    """A short name for each."""
    names = [*map(os.path.basename, workdirs)]
    return names if len(set(names)) == len(names) else workdirs


# Trees of several members


def _numbers(calls: Sequence[Call]) -> dict[str, np.ndarray]:
    """What guard.feed gives beside the batch, [K]."""
    steps = np.array([x.step for x in calls], np.int32)
    return {"step": steps, "limit": np.array([x.limit for x in calls], np.float32)}


def _leaves(state: TrainState) -> list[jax.Array]:
    return jax.tree.leaves(state.replace(frozen={}))


def _stacked(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _replaced(trees: Tree, slot: jax.Array, tree: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x.at[slot].set(y), trees, tree)


def _taken(trees: Tree, slot: jax.Array) -> Tree:
    return jax.tree.map(lambda x: x[slot], trees)


def joined(trees: list[Tree], same: Collection[int] = ()) -> tuple[Tree, Tree]:
    """(arrays [K, ...], axis of members of each) of K trees.

    `same`: ids of arrays that all have. They are left as they are: their axis is None.
    """
    columns = [*zip(*map(jax.tree.leaves, trees), strict=True)]
    structure = jax.tree.structure(trees[0])
    arrays = [x[0] if id(x[0]) in same else jnp.stack(x) for x in columns]
    axes = [None if id(x[0]) in same else 0 for x in columns]
    return jax.tree.unflatten(structure, arrays), jax.tree.unflatten(structure, axes)


def same_ones(trees: list[Tree]) -> set[int]:
    """Ids of the arrays that are the same object in all trees."""
    columns = zip(*map(jax.tree.leaves, trees), strict=True)
    return {id(x[0]) for x in columns if all(y is x[0] for y in x)}


def equal_ones_shared(trees: list[Tree]) -> list[Tree]:
    """The trees, in which arrays that equal the first tree's are the same objects."""
    first = trees[0]

    def shared(x: jax.Array, y: jax.Array) -> jax.Array:
        return x if x is y or bool(jnp.array_equal(x, y)) else y

    return [jax.tree.map(shared, first, tree) for tree in trees]
