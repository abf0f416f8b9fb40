"""Metrics as sums and weights, and where they are written.

Nothing here is ever averaged twice: totals and weights are added over micro-batches,
devices, hosts and batches, and divided once, at the end.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from triform.runtime import files, stores

FILE = "metrics.jsonl"
Array = jax.Array


@struct.dataclass
class Metric:
    """A total and a weight that are added over everything, and divided once."""

    total: Array
    weight: Array

    def value(self) -> float:
        """total / weight on the host; NaN if the weight is zero."""
        total, weight = float(self.total), float(self.weight)
        return total / weight if weight else math.nan


@struct.dataclass
class Mean(Metric):
    """A weighted mean."""

    @classmethod
    def of(cls, values: Array, weights: Array) -> "Mean":
        """From values and weights of the same shape."""
        return cls((values * weights).sum(), weights.sum())


@struct.dataclass
class Perplexity(Mean):
    """exp of a weighted mean negative log-likelihood in nats."""

    def value(self) -> float:
        """exp(total / weight); infinite where that overflows."""
        mean = super().value()
        return math.exp(mean) if mean < 700 else math.inf


@struct.dataclass
class CalibrationError(Metric):
    """Expected calibration error (Guo et al. 2017, eq. 3).

    `total` [bins] holds the sum of (confidence - correct) over the predictions whose
    confidence falls into each of the equally wide bins.
    """

    @classmethod
    def of(
        cls, confidence: Array, correct: Array, weights: Array, bins: int = 15
    ) -> "CalibrationError":
        """From arrays of one shape: top probability, correctness in [0, 1], weight."""
        index = jnp.clip((confidence * bins).astype(jnp.int32), 0, bins - 1)
        gap = (confidence - correct) * weights
        # A loop over bins: scattering millions of values is slow everywhere.
        total = jnp.stack([jnp.where(index == b, gap, 0).sum() for b in range(bins)])
        return cls(total, weights.sum())

    def value(self) -> float:
        """sum over bins of |gap| / weight, in [0, 1]."""
        weight = float(self.weight)
        gaps = np.abs(np.asarray(self.total)).sum()
        return float(gaps) / weight if weight else math.nan


Metrics = Mapping[str, Metric]


def add(a: Metrics | None, b: Metrics) -> Metrics:
    """Element-wise sum of two sets of metrics; None stands for the empty set."""
    return b if a is None else jax.tree.map(lambda x, y: x + y, a, b)


def to_host(metrics: Metrics) -> Metrics:
    """The same on the host in float64, where long sums stay exact; waits for them."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))


def values(metrics: Metrics, prefix: str) -> dict[str, float]:
    """{"prefix/name": value} on the host; what nothing counted for has none."""
    counted = {name: m for name, m in metrics.items() if float(m.weight) != 0}
    return {f"{prefix}/{name}": m.value() for name, m in counted.items()}


def read_lines(workdir: str) -> list[dict[str, Any]]:
    """The objects of a workdir's metrics.jsonl; a file that is not there has none.

    Lines that are none are passed over: a kill may have torn the last one.
    """
    text = files.read_text(os.path.join(workdir, FILE), errors="replace") or ""
    found = [_parse(line) for line in text.split("\n")[:-1]]
    return [line for line in found if line]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "step" in value else None


class MetricWriter:
    """Scalars to `metrics.jsonl`, one object a line, and to TensorBoard event files.

    `time` is in seconds since 1970, `unit` what of the data is counted.

    Opened at the step where a run goes on: what a killed run wrote after it goes, since
    the same steps will be done and written again. On an object store the files are put
    whole from time to time, and by `flush`.
    """

    def __init__(self, workdir: str, step: int, unit: str = "tokens"):
        self._workdir, self._unit = workdir, unit
        self._open(step)

    def go_back(self, step: int, scores: bool = True) -> None:
        """Opens again at an earlier step; without the scores of that step, if these are
        to be found again.
        """
        self.close()
        self._open(step, scores)

    def _open(self, step: int, scores: bool = True) -> None:
        workdir = self._workdir
        kept = [line for line in read_lines(workdir) if line["step"] <= step]
        self._mirror = stores.Mirror(workdir)
        path = os.path.join(self._mirror.folder, FILE)
        if not scores:
            kept = [x for x in kept if x["step"] < step or "train/loss" in x]
        with files.replacing(path) as f:
            f.writelines(files.dumps(line) + "\n" for line in kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (see close)
        # Not at the top: see there.
        from triform.runtime.events import Events

        folder = os.path.join(self._mirror.folder, "tensorboard")
        self._events = Events(folder, step + 1)
        self.flush()

    def write(self, step: int, scalars: Mapping[str, Any], seen: int) -> None:
        """One line, with the time and the tokens (or images) trained on so far.

        Values that are not numbers (a signature) go to the file only.
        """
        line = {"step": step, **scalars}
        line |= {"time": round(time.time(), 3), self._unit: seen}
        self._file.write(files.dumps(line) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            if isinstance(value, (int, float)):
                self._events.add(step, name, value)
        self._events.flush()
        self._mirror.push(only_if_due=True)

    def flush(self) -> None:
        """What was written can be read by others: before its step counts as saved."""
        self._mirror.push()

    def close(self) -> None:
        """Flushes both."""
        try:
            self._file.close()
        finally:
            self._events.close()
            self._mirror.close()


class NoWriter:
    """In place of a MetricWriter where another process writes the same numbers."""

    def __init__(self, workdir: str, step: int, unit: str = "tokens"):
        del workdir, step, unit

    def go_back(self, step: int, scores: bool = True) -> None:
        """Nothing."""

    def write(self, step: int, scalars: Mapping[str, Any], seen: int) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
