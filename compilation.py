"""The train step, compiled for every shape of a batch."""

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from triform.experiment import Experiment, TrainState
from triform.input_pipeline import TrainBatches
from triform.runtime import compile_cache, guard, hosts
from triform.runtime.progress import say, stage

AHEAD = 2000  # steps whose shapes are looked at; beyond that, all shapes are compiled


class Compiled:
    """Index of a shape -> the compiled step, (state, fed) -> (state, metrics).

    They are compiled in threads, in the order in which a run needs the shapes, from the
    first that is asked for. On CPUs training goes on meanwhile with those that are
    there; what a step computes does not depend on that.
    """

    def __init__(
        self, experiment: Experiment, train: TrainBatches, state: TrainState, start: int
    ):
        self._experiment, self._train, self._start = experiment, train, start
        self._state = jax.tree.map(_abstract, state)
        self._step = guard.guarded(experiment.train_step, experiment.config.recovery)
        # Accelerators measure kernels while they compile: nothing else should run. And
        # several hosts must compile the same programs in the same order.
        self._beside = jax.default_backend() == "cpu" and jax.process_count() == 1
        cores = available_cores() if self._beside else 1
        self._pool = ThreadPoolExecutor(cores, "compile")
        self._found: dict[int, Future] = {}

    def __enter__(self) -> "Compiled":
        return self

    def __exit__(self, *error: object) -> None:
        """Compiles nothing more; what is being compiled is waited for at exit."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, index: int) -> Any:
        order = [index]
        if not self._found:
            steps = self._experiment.config.steps
            order += needed(self._train, self._start, steps)
        new = [one for one in dict.fromkeys(order) if one not in self._found]
        for one in new:
            self._found[one] = self._pool.submit(self._compile, one)
        for one in order[:1] if self._beside else order:
            self._wait(one)
        if new:  # nobody waits in a collective, without a line, for who takes longer
            hosts.here().barrier("compiling the step", hosts.SLOW)
        return self._found[index].result()

    def _wait(self, index: int) -> None:
        if not self._found[index].done():
            with stage(f"compiling the step for {self._title(index)}", least=math.inf):
                self._found[index].exception()

    def _title(self, index: int) -> str:
        shape = self._experiment.config.data.shapes()[index]
        return ", ".join(f"{k}={n}" for k, n in shape.items()) or "rows"

    def _compile(self, index: int) -> Any:
        experiment, hits = self._experiment, compile_cache.hits()
        start, placement = time.perf_counter(), experiment.placement
        batch = experiment.empty_batch(experiment.config.data.shapes()[index])
        fed = guard.feed(placement, experiment.put(batch), 1, 0.0)
        step = placement.compile_train(self._step, self._state, fed)
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
