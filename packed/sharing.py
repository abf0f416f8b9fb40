"""Data that members share: opened once, and each batch made once for all."""

import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping

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


class SharedBatches(Batches):
    """Batches of a split, of which the last ones are remembered.

    Members that ask for the same batch get the same object. It has to be read only.
    """

    def __init__(self, batches: Batches, remembered: int):
        super().__init__(batches.dataset)
        self._most, self._lock = remembered, threading.Lock()
        self._recent: OrderedDict[tuple, Batch] = OrderedDict()

    def collate(
        self, index: int, items: np.ndarray, epoch: Epoch, rows: slice = slice(None)
    ) -> Batch:
        """See Batches."""
        key = (index, items.tobytes(), epoch, rows.start, rows.stop)
        with self._lock:
            if key not in self._recent:
                self._recent[key] = super().collate(index, items, epoch, rows)
                if len(self._recent) > self._most:
                    self._recent.popitem(last=False)
            return self._recent[key]


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
