"""One training step after another, each looked at while the next one runs."""

from typing import Any

import jax

from triform.compilation import Compiled
from triform.experiment import Experiment, TrainState
from triform.input_pipeline import TrainBatches
from triform.observe import Observer
from triform.recovery import Recovery
from triform.runtime import guard, hosts, metrics
from triform.runtime.metrics import MetricWriter, NoWriter
from triform.runtime.progress import Progress, stage


def examples_of(train: TrainBatches, number: int) -> str:
    """'12, 7, 3 of train': the first examples of a batch."""
    _, ids = train.ids(number)
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"{shown} of {train.batches.dataset.split}"


class Steps:
    """Calls the compiled steps; what they measured goes to progress and writer."""

    def __init__(
        self,
        experiment: Experiment,
        train: TrainBatches,
        compiled: Compiled,
        recover: Recovery,
        progress: Progress,
        writer: MetricWriter | NoWriter,
        observer: Observer,
    ):
        self._experiment, self._train, self._compiled = experiment, train, compiled
        self._recover, self._progress, self._writer = recover, progress, writer
        self._observer = observer
        self._pending: tuple | None = None  # (step, measured, real units, FLOPs)
        self._begun = False

    def __call__(
        self, state: TrainState, batch: Any, index: int, real: int, step: int
    ) -> TrainState:
        """The state after a step, which may still be under way.

        `index` is that of the batch's shape. UserError or Rewind if the step before was
        bad and is not skipped.
        """
        with self._progress.preparing():
            self._observer.before(step, index, self._compiled[index])
        state, measured = self._run(state, batch, index, step)
        if not self._good(state):
            state, measured = self._run(guard.passed(state), batch, index, step)
        self._observer.after(step, measured)
        self._pending = step, measured, real, self._observer.flops[index]
        return state

    def settle(self, state: TrainState) -> TrainState:
        """The state after the last step, which has ended and was looked at."""
        state = state if self._good(state, saving=True) else guard.passed(state)
        self._pending = None
        return state

    def _run(self, state: TrainState, batch: Any, index: int, step: int) -> tuple:
        limit, placement = self._recover.watch.limit(step), self._experiment.placement
        fed = guard.feed(placement, batch, step, limit)
        compiled = self._compiled[index]
        if self._begun:
            return compiled(state, fed)
        self._begun = True
        with stage("first step"):
            return jax.block_until_ready(compiled(state, fed))

    def _good(self, state: TrainState, saving: bool = False) -> bool:
        """Reads the metrics of the step before: never waits for the one in flight.

        False if that step is skipped: it, and the one in flight, changed nothing.
        """
        if self._pending is None:
            return True
        step, measured, real, flops = self._pending
        watch = self._recover.watch
        measured = dict(metrics.to_host(measured))
        done, scalars = measured.pop(guard.DONE), metrics.values(measured, "train")
        # Each process counts its rows: added up when a number is written somewhere.
        due = saving or step % self._progress.every == 0
        real = hosts.here().total(real if done.value() else 0, due)
        if not done.value():
            self._progress.seen += real
            shown = examples_of(self._train, watch.position(step - 1))
            limit = watch.limit(step)
            self._recover.bad_step(step, scalars, limit, shown, state)
            return False
        watch.take(step, scalars["train/loss"])
        if line := self._progress.update(step, measured, real, flops):
            self._writer.write(step, line, self._progress.seen)
        return True
