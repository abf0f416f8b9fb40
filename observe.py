"""What is seen of a training loop while it runs: FLOPs, memory and a profile.

Nothing here changes a number of the run.
"""

import os
import time
from typing import Any

import jax
from absl import flags

from triform import forecast
from triform.experiment import Experiment
from triform.runtime import files, host, profile, stores
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.partition import Step
from triform.runtime.progress import SOON, Progress, say, stage
from triform.runtime.units import shown

Steps = tuple[int, int] | None  # the first and the last, none at all
SETTLED = 3  # steps after which memory is looked at
LEAST = 10  # steps of which a report is made


def steps_of(text: str | None) -> Steps:
    """(first, last) of 'START:STOP', None of None. UserError if it is none."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(
            f"--profile={text}: write the first and the last step, like 20:25"
        )
    return int(first), int(last)


def define() -> None:
    """Defines the flag --profile."""
    about = "FIRST:LAST step to profile, as 20:25; written to WORKDIR/profile."
    flags.DEFINE_string("profile", None, about)


def asked() -> Steps:
    """The steps that --profile names. UserError for --devices without --dry_run."""
    if flags.FLAGS.devices:
        raise UserError(f"--devices={flags.FLAGS.devices}: only with --dry_run")
    return steps_of(flags.FLAGS.profile)


class Observer:
    """Follows a training loop: `before` and `after` every step, `report` at the end."""

    def __init__(
        self,
        experiment: Experiment,
        progress: Progress,
        workdir: str,
        profiled: Steps = None,
    ):
        self._experiment, self._progress = experiment, progress
        self._folder = os.path.join(workdir, "profile")
        self._profiled, self._tracing = profiled, False
        self._steps: dict[int, Step] = {}
        self.flops: dict[int, int] = {}  # index of a shape -> of a step; 0: unknown
        self._on = forecast.hardware(experiment.config)
        progress.peak = self._on.count * self._on.peak
        self._held = self._measured = 0

    def before(self, step: int, index: int, compiled: Any) -> None:
        """Notes what the step runs; begins the profile if it begins with this step."""
        if index not in self.flops:
            self.flops[index] = 0
            # A run in a pack has no step of its own.
            if isinstance(compiled, Step):
                shape = self._experiment.config.data.shapes()[index]
                self._steps[index] = compiled
                self.flops[index] = forecast.flops_of(self._experiment, compiled, shape)
        if not self._held and self._steps:
            self._held = host.resident_bytes(trim=True)
        if self._profiled and step == self._profiled[0]:
            self._traced = stores.Mirror(self._folder)
            profile.start(self._traced.folder)
            self._tracing = True
            self._began = time.perf_counter(), self._progress.waited_in_all

    def after(self, step: int, measured: Any) -> None:
        """Ends the profile if it ends with this step; looks at the memory once."""
        if self._steps and step == self._progress.first + SETTLED:
            jax.block_until_ready(measured)
            self._measured = self._memory()
        if self._tracing and step == self._profiled[1]:
            jax.block_until_ready(measured)
            self._end(step)

    def _end(self, step: int) -> None:
        """Writes the profile, and prints its tables."""
        began, waited = self._began
        wall = time.perf_counter() - began
        waited = self._progress.waited_in_all - waited
        first, self._tracing = self._profiled[0], False
        with self._progress.paused():
            with stage(f"writing the profile of steps {first} to {step}"):
                found = profile.stop(self._traced.folder)
                self._traced.close()
                texts = [x.compiled.as_text() for x in self._steps.values()]
                text = profile.table(found, texts, step - first + 1, wall, waited)
            say(f"{text}\nprofile: {self._folder} (TensorBoard, ui.perfetto.dev)")

    def _memory(self) -> int:
        """Bytes of a device that were in use at most; 0 if that cannot be told."""
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        if peak := max((x.get("peak_bytes_in_use", 0) for x in stats), default=0):
            return peak
        grown = host.resident_bytes() - self._held
        if jax.default_backend() != "cpu" or not self._held or grown <= 0:
            return 0
        held, _ = forecast.compiled_bytes(next(iter(self._steps.values())))
        return held + grown // jax.local_device_count()

    def report(self, checkpointer: Checkpointer) -> None:
        """Prints predicted beside measured: memory, time of a step and a checkpoint.

        Nothing after a few steps, which say little.
        """
        if self._progress.step - self._progress.first < LEAST or not self._steps:
            return
        with stage("what was predicted", least=SOON):
            found = forecast.of(self._experiment.config)
        step = max(self._steps.values(), key=lambda s: sum(forecast.compiled_bytes(s)))
        lines = [
            f"memory a device: predicted {shown(found.total())}, compiled "
            f"{shown(sum(forecast.compiled_bytes(step)))}"
        ]
        if self._measured:
            lines[0] += f", measured {shown(self._measured)}"
        seconds = forecast.seconds(found, self._on)
        told = f"predicted {seconds:.4f} s ({self._on.utilisation:.0%} of the peak)"
        if not seconds:
            told = "not predicted, since the peak of this device is unknown"
        lines.append(f"a step: {told}; measured {self._progress.pace():.4f} s")
        size = files.size_below(f"{checkpointer.directory}/{checkpointer.latest()}")
        lines.append(
            f"a checkpoint: predicted {shown(found.checkpoint)}, measured {shown(size)}"
        )
        say("\n".join(["predicted and measured:", *(f"  {x}" for x in lines)]))

    def close(self) -> None:
        """Ends a profile that the run did not live to the end of."""
        if self._tracing:
            self._end(self._progress.step)
