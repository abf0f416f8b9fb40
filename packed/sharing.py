"""Data that members share: opened once, and each batch made once for all."""

import dataclasses
import json
import threading
from collections import deque
from collections.abc import Mapping
from weakref import WeakValueDictionary

import numpy as np

from triform import plan, train
from triform import workdir as workdirs
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.data.batch import Batch
from triform.data.codecs import Codec
from triform.data.datasets.base import Epoch
from triform.experiment import Experiment
from triform.input_pipeline import Batches, TrainBatches

AHEAD = 4  # batches between two members at the same step, beside those prefetched


class Rows(dict):
    """A batch that can be found as long as somebody has it."""


class SharedBatches(Batches):
    """Batches of a split: whoever asks for the same one gets the same object.

    As long as another one has it, or it is among the last ones. It is read only.
    """

    def __init__(self, batches: Batches, remembered: int):
        super().__init__(batches.dataset)
        self._lock = threading.Lock()
        self._held: WeakValueDictionary[tuple, Rows] = WeakValueDictionary()
        self._last: deque[Rows] = deque(maxlen=remembered)

    def collate(
        self, index: int, items: np.ndarray, epoch: Epoch, rows: slice = slice(None)
    ) -> Batch:
        """See Batches."""
        key = (index, items.tobytes(), epoch, rows.start, rows.stop)
        with self._lock:
            found = self._held.get(key)
            if found is None:
                found = Rows(super().collate(index, items, epoch, rows))
                self._held[key] = found
                self._last.append(found)
            return found


class Opened:
    """Codecs and splits of the members of a pack, which is `count` members."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._codecs: dict[str, Mapping[str, Codec]] = {}
        self._splits: dict[str, plan.Splits] = {}

    def codecs(self, config: ExperimentConfig, workdir: str) -> Mapping[str, Codec]:
        """As train.find_codecs; those of new workdirs are built once."""
        if workdirs.saved_config(workdir) is not None:
            return train.find_codecs(config, workdir)
        key = _key(config, ("data.", "init"), config.model.sizes())
        if key not in self._codecs:
            self._codecs[key] = train.find_codecs(config, workdir)
        return self._codecs[key]

    def splits(
        self, experiment: Experiment, codecs: Mapping[str, Codec]
    ) -> plan.Splits:
        """As plan.Splits.open; each split is opened once."""
        config = experiment.config
        known = {name: codec.digest() for name, codec in codecs.items()}
        key = _key(config, ("data.", "evaluation"), [known, experiment.sizes])
        if key not in self._splits:
            self._splits[key] = self._open(experiment, codecs)
        found = self._splits[key]
        batches = TrainBatches(found.train.batches, config.seed)
        return dataclasses.replace(found, config=config, train=batches)

    def _open(self, experiment: Experiment, codecs: Mapping[str, Codec]) -> plan.Splits:
        found = plan.Splits.open(experiment, codecs)
        most = self._count * (experiment.config.data.prefetch + AHEAD)
        splits = [found.test, *(split for split, _ in found.evaluated.values())]
        shared: dict[int, Batches] = {}
        for holder in (found.train, *splits):
            old = holder.batches
            if not isinstance(old, SharedBatches):
                shared.setdefault(id(old), SharedBatches(old, most))
                holder.batches = shared[id(old)]
        return found


def _key(config: ExperimentConfig, prefixes: tuple[str, ...], more: object) -> str:
    flat = schema.flat(config)
    kept = {k: x for k, x in flat.items() if k.startswith(prefixes)}
    return json.dumps([kept, more], sort_keys=True)
