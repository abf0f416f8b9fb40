"""Source -> dataset -> batches. Batch t is a function of (seed, t).

A dataset (see dataset/) writes one item of a split into one row. What is written
here holds for all of them: which items make a batch, in which order, what is checked,
and that evaluation sees every item once. The position of a run is one integer, the
step, on any number of devices.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from triform.data.datasets.base import EVALUATION, Batch, Dataset, Epoch, Limits
from triform.runtime.errors import DataError

# Key of a batch: what must be raised if it holds an id that the model has not.
RAISED = {
    "inputs": "model.vocab_size or use the tokenizer of this model",
    "token_type_ids": "model.num_types",
    "label": "model.num_labels",
}


class Batches:
    """The batches of one split.

    Each item belongs to the shortest bucket that holds it.
    """

    def __init__(self, dataset: Dataset):
        self.dataset, self.config = dataset, dataset.config
        empty = np.flatnonzero(dataset.sizes < 0)
        if len(empty) and not self.config.drop_empty:
            raise DataError(
                f"{dataset.describe(int(empty[0]))}: a text is empty; mend the "
                "corpus or set data.drop_empty=True"
            )

    def buckets(self, cut: bool) -> dict[int, np.ndarray]:
        """Row length -> items, ascending. Over-long ones are in the last if `cut`."""
        lengths, sizes = self.config.lengths(), self.dataset.sizes
        which = np.searchsorted(
            lengths, np.minimum(sizes, lengths[-1]) if cut else sizes
        )
        result = {
            n: np.flatnonzero((which == i) & (sizes >= 0))
            for i, n in enumerate(lengths)
        }
        if not any(map(len, result.values())):
            raise DataError(
                f"{self.dataset.title()}: none of its {len(sizes)} items fits into "
                f"data.max_len={lengths[-1]}; raise it"
            )
        return {n: items for n, items in result.items() if len(items)}

    def collate(self, length: int, items: np.ndarray, epoch: Epoch) -> Batch:
        """The batch of these items with rows of `length`, checked.

        Always the full number of rows of that length: missing ones have weight 0.
        """
        dataset, rows = self.dataset, self.config.rows(length)
        batch = dataset.empty(self.config, rows, length, dataset.limits)
        for row, item in enumerate(items.tolist()):
            dataset.write(batch, row, item, epoch)
        check_batch(batch, dataset.limits, lambda row: dataset.describe(items[row]))
        return batch

    def cut(self) -> int:
        """How many items are longer than the longest row: evaluation shortens them."""
        return int((self.dataset.sizes > self.config.lengths()[-1]).sum())

    def evaluation(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """(items, batch) in a fixed order, every item exactly once."""
        for length, items in self.buckets(cut=True).items():
            rows = self.config.rows(length)
            for start in range(0, len(items), rows):
                part = items[start : start + rows]
                yield part, self.collate(length, part, EVALUATION)


class TrainBatches:
    """Endless training batches, addressed by step.

    A bucket's items are permuted by (seed, epoch), cut into batches, the last one
    smaller, and the batches of all buckets permuted by (seed, epoch).
    """

    def __init__(self, batches: Batches, seed: int):
        self.batches, self.seed = batches, seed
        self.buckets = batches.buckets(cut=batches.dataset.cut)
        kept = sum(map(len, self.buckets.values()))
        self.left_out = len(batches.dataset.sizes) - kept
        self._epoch = (0, self.plan(0))
        self.per_epoch = len(self._epoch[1])

    def ids(self, step: int) -> tuple[int, np.ndarray]:
        """(row length, items) of the batch of a step."""
        epoch, position = divmod(step, self.per_epoch)
        cached, plan = self._epoch
        if cached != epoch:
            plan = self.plan(epoch)
            self._epoch = (epoch, plan)
        return plan[position]

    def plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(row length, items) of every batch of an epoch."""
        epoch = self._epoch_of(epoch)
        rng = epoch.rng()
        slots = []
        for length, items in self.buckets.items():
            order = self.batches.dataset.order(items, epoch, rng)
            rows = self.batches.config.rows(length)
            slots += [(length, order[i : i + rows]) for i in range(0, len(order), rows)]
        return [slots[i] for i in rng.permutation(len(slots))]

    def _epoch_of(self, epoch: int) -> Epoch:
        return Epoch(self.seed, epoch, train=True)

    def __getitem__(self, step: int) -> Batch:
        length, items = self.ids(step)
        return self.batches.collate(
            length, items, self._epoch_of(step // self.per_epoch)
        )

    def shapes(self) -> list[int]:
        """The row lengths that occur, ascending."""
        return list(self.buckets)

    def fill(self) -> float:
        """Share of the places of an epoch that its items need."""
        config, sizes = self.batches.config, self.batches.dataset.sizes
        plan = self.plan(0)
        needed = sum(int(np.minimum(sizes[items], n).sum()) for n, items in plan)
        return needed / max(1, sum(n * config.rows(n) for n, _ in plan))


def check_batch(batch: Batch, limits: Limits, name: Callable[[int], str]) -> None:
    """Stops on ids that the model does not know: an embedding makes them NaN silently.

    `name(row)` says which item a row is.
    """
    for key, limit in limits.items():
        x = batch.get(key)
        if x is None or not np.issubdtype(x.dtype, np.integer):
            continue
        bad = (x < 0) | (x >= limit)
        if bad.any():
            row = int(np.flatnonzero(bad.reshape(len(x), -1).any(-1))[0])
            value = int(x[row][bad[row]].flat[0])
            raise DataError(
                f"{name(row)}: id {value} in '{key}' is outside the vocabulary of "
                f"{limit}; raise {RAISED.get(key, RAISED['inputs'])}"
            )


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
        item, self._over = self._queue.get()
        if self._over is not None:
            raise self._over
        return item

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join()


def report(train: TrainBatches) -> str:
    """One paragraph: items, buckets, steps an epoch, share of places in use."""
    config, dataset = train.batches.config, train.batches.dataset
    visited = dict.fromkeys(train.buckets, 0)
    for length, items in train.plan(0):
        visited[length] += len(items)
    lines = [
        f"data: {dataset.title()}, {sum(visited.values()):,} rows and "
        f"{train.per_epoch:,} batches an epoch"
    ]
    for length, count in visited.items():
        if length:
            rows = config.rows(length)
            lines.append(f"  length {length}: {count:,} rows, {rows} a batch")
    if config.lengths()[-1]:
        lines[0] += f", {train.fill():.1%} of their places are in use"
    if dataset.cut and train.batches.cut():
        lines.append(
            f"  {train.batches.cut():,} longer than data.max_len={config.max_len}, cut"
        )
    if train.left_out:
        lines.append(
            f"  {train.left_out:,} longer than data.max_len={config.max_len} or empty, "
            "left out of training"
        )
    return "\n".join(lines)
