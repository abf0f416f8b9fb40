"""The train step, compiled for every shape of a batch."""

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from triform.experiment import Experiment, TrainState
from triform.input_pipeline import TrainBatches
from triform.runtime import compile_cache
from triform.runtime.progress import say, stage

AHEAD = 2000  # steps whose shapes are looked at; beyond that, all shapes are compiled


class Steps:
    """Index of a shape -> the compiled step: (state, batch) -> (state, metrics).

    Compiled in threads, in the order in which a run needs the shapes. On CPUs it trains
    meanwhile with those that are there; what a step computes does not depend on that.
    """

    def __init__(
        self, experiment: Experiment, train: TrainBatches, state: TrainState, start: int
    ):
        self._experiment, self._state = experiment, jax.tree.map(_abstract, state)
        order = needed(train, start, experiment.config.steps)
        alone = jax.default_backend() == "cpu" and jax.process_count() == 1
        # Accelerators measure kernels while they compile: nothing else should run. And
        # several hosts must compile the same programs in the same order.
        workers = min(len(order), available_cores()) if alone else 1
        self._pool = ThreadPoolExecutor(max(1, workers), "compile")
        self._found: dict[int, Future] = {}
        for index in order:
            self._found[index] = self._pool.submit(self._compile, index)
        for index in order[:1] if alone else order:
            self[index]

    def __getitem__(self, index: int) -> Any:
        if index not in self._found:
            self._found[index] = self._pool.submit(self._compile, index)
        found = self._found[index]
        if not found.done():
            with stage(f"compiling the step for {self._title(index)}", least=math.inf):
                found.result()
        return found.result()

    def close(self) -> None:
        """Compiles nothing more. What is being compiled is waited for at exit."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _title(self, index: int) -> str:
        shape = self._experiment.config.data.shapes()[index]
        return ", ".join(f"{k}={n}" for k, n in shape.items()) or "rows"

    def _compile(self, index: int) -> Any:
        experiment, hits = self._experiment, compile_cache.hits()
        shape = experiment.config.data.shapes()[index]
        start = time.perf_counter()
        batch = experiment.put(experiment.empty_batch(shape))
        step = experiment.placement.compile_train(
            experiment.train_step, self._state, batch
        )
        seconds = time.perf_counter() - start
        how = ", cached" if compile_cache.hits() > hits else ""
        say(f"compiling the step for {self._title(index)}{how}: {seconds:.1f} s")
        return step


def needed(train: TrainBatches, start: int, stop: int) -> list[int]:
    """The indices of the shapes that steps start + 1 to stop need, first ones first."""
    end = min(stop, start + AHEAD, start + train.per_epoch)
    order = dict.fromkeys(train.ids(step)[0] for step in range(start, end))
    return [*order] if end == stop else [*dict.fromkeys([*order, *train.shapes()])]


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape and placement: the arrays themselves are donated to the first step."""
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding, weak_type=jax.typeof(x).weak_type
    )
