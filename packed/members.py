"""A member of a pack: an ordinary run, whose experiment computes with the others'."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from triform.data.batch import Batch
from triform.experiment import Experiment, TrainState
from triform.runtime.partition import MeshPlacement

Tree = Any
FIELDS = (
    "replace",
    "variables",
    *(field.name for field in dataclasses.fields(TrainState)),
)


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
    """A step that a member asks for, and of what."""

    kind: str  # 'train' or 'eval'
    about: tuple  # the function, in evaluation, and the shapes of the batch
    state: Any  # TrainState or Held; in evaluation variables
    batch: "HostBatch"
    step: Any  # its number, of updates done
    limit: Any = 0.0  # of the loss, see runtime/guard.py


@dataclasses.dataclass(eq=False)
class HostBatch(Mapping):
    """A batch of a member, which goes onto the devices with the others'."""

    rows: Batch
    axes: Mapping[str, str]
    parts: int

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def shapes(self) -> tuple:
        """What a program is compiled for."""
        return tuple((k, x.shape, str(x.dtype)) for k, x in sorted(self.rows.items()))


class Held:
    """The state of a member, which is among the others': read, it is copied."""

    def __init__(self, pack: Packs, index: int):
        self._pack, self._index = pack, index

    def __getattr__(self, name: str) -> Any:
        if name not in FIELDS:
            raise AttributeError(name)
        return getattr(self._pack.state_of(self._index), name)


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

    def put(
        self, batch: Batch, axes: Mapping[str, str], parts: int = 1, total: int = 0
    ) -> HostBatch:
        """The batch, still on the host."""
        return HostBatch(batch, axes, parts)

    def same(self, x: Any) -> Any:
        """A number that all devices get, still on the host."""
        return x

    def unload(self, state: Any) -> Tree:
        """The state as it is saved."""
        held = isinstance(state, Held)
        return self._pack.state_of(self._index) if held else state

    def compile_train(self, step: Callable, state: Any, fed: dict) -> Callable:
        """(state, fed) -> (state, metrics). The pack compiles the same step for all
        members when they first ask for it.
        """

        def run(state: Any, fed: dict) -> tuple[Held, Tree]:
            batch = fed["batch"]
            about = (batch.shapes(),)
            measured = self._ask(
                "train", about, state, batch, fed["step"], fed["limit"]
            )
            return Held(self._pack, self._index), measured

        return run

    def compile_eval(self, step: Callable) -> Callable:
        """(variables, step, batch) -> (metrics, rows)."""

        def run(variables: Tree, number: Any, batch: HostBatch) -> tuple[Tree, Tree]:
            about = (step.__func__, batch.shapes())
            return self._ask("eval", about, variables, batch, number)

        return run

    def _ask(self, kind: str, about: tuple, *inputs: Any) -> Any:
        return self._pack.ask(self._index, Call(kind, about, *inputs))


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
