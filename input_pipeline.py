"""Source -> dataset -> batches. Batch t is a function of (seed, t).

A dataset (see data/datasets/) writes one item of a split into one row. What is written
here holds for all of them: which items make a batch, in which order, what is checked,
and that evaluation sees every item once. The position of a run is one integer, the
step, on any number of devices.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from triform.data import batch as batches
from triform.data.batch import Batch, Shape, Sizes
from triform.data.codecs import Codec
from triform.data.datasets import dataset
from triform.data.datasets.base import EVALUATION, Dataset, Epoch
from triform.runtime.errors import DataError


class Batches:
    """The batches of one split.

    Each item belongs to the shortest bucket that holds it.
    """

    def __init__(self, dataset: Dataset):
        self.dataset, self.config = dataset, dataset.config
        empty = np.flatnonzero(dataset.empty)
        if len(empty) and not self.config.drop_empty:
            raise DataError(
                f"{dataset.describe(int(empty[0]))}: a text is empty; correct the "
                "corpus or set data.drop_empty=True"
            )

    def buckets(self, truncate: bool) -> dict[int, np.ndarray]:
        """Index of a shape -> items, ascending: each in the first shape that holds it.

        Longer items are in the last one if `truncate`, else left out.
        """
        dataset, shapes = self.dataset, self.config.shapes()
        which = np.full(len(dataset), len(shapes) - 1 if truncate else len(shapes))
        for index in reversed(range(len(shapes))):
            which[self.fits(shapes[index])] = index
        which[dataset.empty] = len(shapes)
        found = {i: np.flatnonzero(which == i) for i in range(len(shapes))}
        if not any(map(len, found.values())):
            raise DataError(
                f"{dataset.title()}: none of its {len(dataset)} items fits into rows "
                f"of {_shown(shapes[-1])}; raise data.max_len"
            )
        return {i: items for i, items in found.items() if len(items)}

    def fits(self, shape: Shape) -> np.ndarray:
        """bool [N]: items that the shape holds."""
        fits = np.ones(len(self.dataset), bool)
        for axis, needed in self.dataset.sizes.items():
            fits &= needed <= shape[axis]
        return fits

    def collate(
        self, index: int, items: np.ndarray, epoch: Epoch, rows: slice = slice(None)
    ) -> Batch:
        """The batch of these items in the shape of this index, checked.

        Always the full number of rows of that shape: missing ones have weight 0. Of
        these, the given ones: each is a function of (seed, step, row) alone.
        """
        dataset, shape = self.dataset, self.config.shapes()[index]
        sizes = batches.resolved(shape, dataset.model_sizes)
        chosen = range(self.config.rows(shape))[rows]
        items = items[rows]
        batch = batches.zeros(dataset.spec, {"B": len(chosen), **sizes})
        for row, item in enumerate(items.tolist()):
            dataset.write(batch, row, item, epoch)
        batches.check(
            *(batch, dataset.spec, dataset.model_sizes),
            lambda row: dataset.describe(int(items[row])),
        )
        return batch

    def real(self, batch: Batch) -> int:
        """Number of tokens (or images) that are no padding."""
        return batches.count(batch, self.dataset.spec)

    def truncated(self, limit: int = 0) -> int:
        """How many items are longer than the longest row: evaluation shortens them."""
        longer = ~self.fits(self.config.shapes()[-1]) & ~self.dataset.empty
        return int((longer & self._spread(limit)).sum())

    def evaluation(self, limit: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        """(items, batch) in a fixed order, every item exactly once.

        Of every corpus at most `limit` items, spread evenly; 0: all.
        """
        for index, items in self.parts(limit):
            yield items, self.collate(index, items, EVALUATION)

    def parts(self, limit: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(index of its shape, items) of every batch of an evaluation."""
        shapes, chosen = self.config.shapes(), self._spread(limit)
        for index, items in self.buckets(truncate=True).items():
            items = items[chosen[items]]
            rows = self.config.rows(shapes[index])
            for start in range(0, len(items), rows):
                yield index, items[start : start + rows]

    def _spread(self, limit: int) -> np.ndarray:
        """bool [N]: at most `limit` items of every corpus, spread evenly; 0: all.

        The first ones would not do: files are often sorted, by class for instance.
        """
        if not limit:
            return np.ones(len(self.dataset), bool)
        corpora: dict[str, list[int]] = {}
        for item in np.flatnonzero(~self.dataset.empty).tolist():
            corpora.setdefault(self.dataset.group(item)[0], []).append(item)
        chosen = np.zeros(len(self.dataset), bool)
        for items in corpora.values():
            count = min(limit, len(items))
            chosen[np.array(items)[np.arange(count) * len(items) // count]] = True
        return chosen


@dataclasses.dataclass
class Split:
    """One split, opened."""

    name: str
    batches: Batches
    dataset: Dataset

    @classmethod
    def open(
        cls, config: Any, codecs: Mapping[str, Codec], name: str, sizes: Sizes
    ) -> "Split":
        """DataError if it does not exist or holds what the model cannot read."""
        opened = dataset(config, name, codecs, sizes)
        found = Batches(opened)
        found.buckets(truncate=True)
        return cls(name, found, opened)


class TrainBatches:
    """Endless training batches, addressed by step.

    A bucket's items are permuted by (seed, epoch) and divided into batches, the last
    one smaller, and the batches of all buckets permuted by (seed, epoch).
    """

    def __init__(self, batches: Batches, seed: int):
        self.batches, self.seed = batches, seed
        self.buckets = batches.buckets(truncate=batches.dataset.truncates)
        kept = sum(map(len, self.buckets.values()))
        self.left_out = len(batches.dataset) - kept
        self._epoch = (0, self.plan(0))
        self.per_epoch = len(self._epoch[1])

    def ids(self, step: int) -> tuple[int, np.ndarray]:
        """(index of its shape, items) of the batch of a step."""
        epoch, position = divmod(step, self.per_epoch)
        cached, plan = self._epoch
        if cached != epoch:
            plan = self.plan(epoch)
            self._epoch = (epoch, plan)
        return plan[position]

    def plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(index of its shape, items) of every batch of an epoch."""
        epoch = self._epoch_of(epoch)
        rng = epoch.rng()
        slots = []
        config, shapes = self.batches.config, self.batches.config.shapes()
        for index, items in self.buckets.items():
            order = self.batches.dataset.order(items, epoch, rng)
            rows = config.rows(shapes[index])
            slots += [(index, order[i : i + rows]) for i in range(0, len(order), rows)]
        return [slots[i] for i in rng.permutation(len(slots))]

    def _epoch_of(self, epoch: int) -> Epoch:
        return Epoch(self.seed, epoch, train=True)

    def __getitem__(self, step: int) -> Batch:
        return self.batch(step)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The given rows of the batch of a step."""
        index, items = self.ids(step)
        epoch = self._epoch_of(step // self.per_epoch)
        return self.batches.collate(index, items, epoch, rows)

    def shapes(self) -> list[int]:
        """The indices of the shapes that occur, ascending."""
        return list(self.buckets)

    def fill(self) -> float:
        """Share of the positions of an epoch that its items need."""
        config, dataset = self.batches.config, self.batches.dataset
        shapes, needed, total = config.shapes(), 0, 0
        for index, items in self.plan(0):
            shape = shapes[index]
            for axis, sizes in dataset.sizes.items():
                needed += int(np.minimum(sizes[items], shape[axis]).sum())
                total += shape[axis] * config.rows(shape)
        return needed / max(1, total)


def _shown(shape: Shape) -> str:
    """'S=64, L=32'."""
    return ", ".join(f"{axis}={size}" for axis, size in shape.items())


class Prefetch:
    """Runs an iterator in a thread, `depth` items ahead; errors arrive where read."""

    def __init__(self, items: Iterable, depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._over: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterable) -> None:
        try:
            for item in items:
                if not self._offer((item, None)):
                    return
            self._offer((None, StopIteration()))
        except BaseException as error:  # handed to the reader, whatever it is
            self._offer((None, error))

    def _offer(self, entry: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self):
        if self._over is not None:
            raise self._over
        item, self._over = self._next()
        if self._over is not None:
            raise self._over
        return item

    def _next(self) -> tuple:
        while True:
            alive = self._thread.is_alive()  # asked before: its last item may follow
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                if not alive:
                    raise DataError(
                        "the thread that prepares batches has died; start again"
                    ) from None

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join()


def moved(old: TrainBatches, new: TrainBatches, step: int) -> str:
    """What becomes of the running epoch if `new` follows `old` after `step` batches.

    '' if nothing changes: the batches still to come are the ones that `old` had.
    """
    (epoch, position), (other, start) = (divmod(step, x.per_epoch) for x in (old, new))
    before, after = old.plan(epoch), new.plan(other)
    if step == 0 or (epoch == other and _same(before, after)):
        return ""
    where = f"epoch {epoch + 1} was {position / len(before):.0%} done"
    if epoch != other or position != start:
        where += f", and epoch {other + 1} begins {start / len(after):.0%} in"
    if len(old.batches.dataset) != len(new.batches.dataset):
        # Other rows of the same text: shares of it are all that can be compared.
        seen, rest = position / len(before), 1 - start / len(after)
        twice, never = f"about {seen * rest:.0%}", f"{(1 - seen) * (1 - rest):.0%}"
        return f"{where}: {twice} of it come twice and {never} never in this epoch"
    seen, rest = (
        np.concatenate([np.zeros(0, np.int64), *(items for _, items in part)])
        for part in (before[:position], after[start:])
    )
    everything = np.concatenate([items for _, items in (*before, *after)])
    twice = np.intersect1d(seen, rest)
    never = np.setdiff1d(everything, np.concatenate([seen, rest]))
    return (
        f"{where}: of {len(np.unique(everything)):,} items {len(twice):,} come twice "
        f"and {len(never):,} never in this epoch"
    )


def _same(a: list[tuple[int, np.ndarray]], b: list[tuple[int, np.ndarray]]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(np.array_equal(x, y) for (_, x), (_, y) in pairs)


def report(train: TrainBatches) -> str:
    """One paragraph: where items are from, buckets, steps an epoch, what is cut."""
    config, dataset = train.batches.config, train.batches.dataset
    visited, shapes = dict.fromkeys(train.buckets, 0), config.shapes()
    for index, items in train.plan(0):
        visited[index] += len(items)
    lines = [
        f"data: {dataset.title()}, {sum(visited.values()):,} rows and "
        f"{train.per_epoch:,} batches an epoch"
    ]
    if dataset.sizes:
        lines[0] += f", {train.fill():.1%} of their positions are in use"
    lines += [f"  {line}" for line in dataset.origin()]
    if dataset.sizes:
        for index, count in visited.items():
            shape = shapes[index]
            lines.append(
                f"  rows of {_shown(shape)}: {count:,}, {config.rows(shape)} a batch"
            )
        sizes = {axis: int(x.max(initial=0)) for axis, x in dataset.sizes.items()}
        if any(
            x.min(initial=size) < size
            for x, size in zip(dataset.sizes.values(), sizes.values(), strict=True)
        ):
            lines.append(f"  the longest needs {_shown(sizes)}")
    more = (*_cut(train), *dataset.remarks())
    return "\n".join([*lines, *(f"  {line}" for line in more)])


def _cut(train: TrainBatches) -> list[str]:
    """What of the items training does not see, and what share of all that is."""
    dataset, shape = train.batches.dataset, train.batches.config.shapes()[-1]
    longer, empty = train.batches.truncated(), int(dataset.empty.sum())
    lines = []
    if longer:
        lost = total = 0
        for axis, sizes in dataset.sizes.items():
            kept = np.minimum(sizes, shape[axis])
            if not dataset.truncates:  # all of an item goes if one side is too long
                kept = np.where(train.batches.fits(shape), sizes, 0)
            lost, total = lost + int((sizes - kept).sum()), total + int(sizes.sum())
        how = "shortened" if dataset.truncates else "left out of training"
        lines.append(
            f"{longer:,} of {len(dataset):,} are longer than {_shown(shape)}, {how}: "
            f"{lost / total:.1%} of all {dataset.unit}"
        )
    if empty:
        lines.append(f"{empty:,} of {len(dataset):,} are empty, left out")
    return lines
