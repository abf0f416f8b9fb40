"""A member of a pack: an ordinary run, whose experiment computes with the others'."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from triform.data.batch import Batch
from triform.experiment import Experiment
from triform.runtime.partition import MeshPlacement

Tree = Any


class Packs(Protocol):
    """What a member asks of its pack."""

    def init(self, alone: MeshPlacement, index: int, make: Callable[[], Tree]) -> Tree:
        """The state that `make` gives."""

    def ask(self, index: int, call: "Call") -> Any:
        """What a call gives, once it was computed."""

    def state_of(self, index: int) -> Tree:
        """A copy of the state of a member."""


@dataclasses.dataclass
class Call:
    """A step that a member asks for. Calls of one `key` can be computed at once."""

    key: tuple
    step: Callable  # a bound method of its experiment
    state: Any  # TrainState or HELD; variables
    batch: "HostBatch"
    number: Any = None  # of the step, in evaluation


@dataclasses.dataclass
class HostBatch:
    """A batch of a member, which goes onto the devices with the others'."""

    rows: Batch
    axes: Mapping[str, str]
    parts: int

    def shapes(self) -> tuple:
        """What a program is compiled for."""
        return tuple((k, x.shape, str(x.dtype)) for k, x in sorted(self.rows.items()))


class Held:
    """The state of a member, which is among the others'."""


HELD = Held()


class Shares:
    """A tree whose leaves [K, ...] are brought to the host once, when one is read."""

    def __init__(self, tree: Tree):
        self._leaves, self.structure = jax.tree.flatten(tree)
        self._read = False

    def leaves(self) -> list[np.ndarray]:
        """The leaves on the host."""
        if not self._read:
            self._leaves, self._read = jax.device_get(self._leaves), True
        return self._leaves

    def of(self, slot: int) -> Tree:
        """The tree of one member; its leaves become arrays when they are read."""
        shares = [Share(self, i, slot) for i in range(len(self._leaves))]
        return jax.tree.unflatten(self.structure, shares)


@dataclasses.dataclass
class Share:
    """One member's part of a leaf."""

    shares: Shares
    leaf: int
    slot: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.shares.leaves()[self.leaf][self.slot], dtype)


class Together:
    """The placement of a member: asks the pack for what the others ask for, too."""

    def __init__(self, alone: MeshPlacement, pack: Packs, index: int):
        self.alone, self._pack, self._index = alone, pack, index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["alone"], name)

    def init(self, make: Callable[[], Tree]) -> Tree:
        """As the placement's, with a program that other members share."""
        return self._pack.init(self.alone, self._index, make)

    def put(self, batch: Batch, axes: Mapping[str, str], parts: int = 1) -> HostBatch:
        """The batch, still on the host."""
        return HostBatch(batch, axes, parts)

    def unload(self, state: Any) -> Tree:
        """The state as it is saved."""
        return self._pack.state_of(self._index) if state is HELD else state

    def compile_train(self, step: Callable, state: Tree, batch: HostBatch) -> Callable:
        """(state, batch) -> (HELD, metrics)."""
        pack, shapes = self._pack, batch.shapes()
        pack.ask(self._index, Call(("compile", shapes), step, state, batch))

        def run(state: Any, batch: HostBatch) -> tuple[Held, Tree]:
            call = Call(("train", shapes), step, state, batch)
            return HELD, pack.ask(self._index, call)

        return run

    def compile_eval(self, step: Callable) -> Callable:
        """(variables, step, batch) -> (metrics, rows)."""

        def run(variables: Tree, number: Any, batch: HostBatch) -> tuple[Tree, Tree]:
            key = ("eval", step.__func__, batch.shapes())
            call = Call(key, step, variables, batch, number)
            return self._pack.ask(self._index, call)

        return run


@dataclasses.dataclass
class Member(Experiment):
    """The experiment of a member."""

    pack: Packs
    index: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.placement = Together(self.placement, self.pack, self.index)

    def evaluation_variables(self, state: Any) -> Tree:
        """See Experiment."""
        return super().evaluation_variables(self.placement.unload(state))
