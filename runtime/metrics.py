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
from tensorboardX import SummaryWriter

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
    """{'prefix/name': value} of metrics on the host."""
    return {f"{prefix}/{name}": m.value() for name, m in metrics.items()}


def read_lines(workdir: str) -> list[dict[str, Any]]:
    """The objects of a workdir's metrics.jsonl.

    Lines that are none are passed over: a kill may have torn the last one.
    """
    path = os.path.join(workdir, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as f:
        found = [_parse(line) for line in f if line.endswith("\n")]
    return [line for line in found if line]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "step" in value else None


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


class MetricWriter:
    """Scalars to `metrics.jsonl`, one object a line, and to TensorBoard event files.

    `time` is in seconds since 1970, `unit` what of the data is counted.

    Opened at the step where a run goes on: what a killed run wrote after it goes, since
    the same steps will be done and written again.
    """

    def __init__(self, workdir: str, step: int, unit: str = "tokens"):
        self._unit = unit
        path = os.path.join(workdir, "metrics.jsonl")
        kept = [line for line in read_lines(workdir) if line["step"] <= step]
        with open(path + ".tmp", "w") as f:
            f.writelines(_text(line) for line in kept)
        os.replace(path + ".tmp", path)
        self._file = open(path, "a")  # noqa: SIM115  (closed by close)
        self._events = SummaryWriter(
            os.path.join(workdir, "tensorboard"), purge_step=step + 1
        )

    def write(self, step: int, scalars: Mapping[str, Any], seen: int) -> None:
        """One line, with the time and the tokens (or images) trained on so far.

        Values that are not numbers (a signature) go to the file only.
        """
        line: dict[str, Any] = {"step": step}
        for name, value in scalars.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            # JSON has no NaN: a reader in another language would choke on the line.
            line[name] = value if finite else str(value)
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)
        line |= {"time": round(time.time(), 3), self._unit: seen}
        self._file.write(_text(line))
        self._file.flush()

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._events.close()
