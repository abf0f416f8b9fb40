"""When numbers are no longer finite: what is saved, and going back to an older step.

A bad step (runtime/guard.py) has changed nothing. By `recovery.action` the run ends
with one line, goes on without that update, or goes back and leaves batches out.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.runtime import files, guard, hosts, metrics
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import CheckpointError, UserError
from triform.runtime.leaves import not_finite, some

ADVICE = (
    "lower optim.learning_rate, set optim.clip_norm=1 or lengthen optim.warmup_steps, "
    "and start again"
)


class Rewind(Exception):
    """A run goes back to a checkpoint before this step."""

    def __init__(self, step: int):
        super().__init__(f"step {step} was bad")
        self.step = step


class Recovery:
    """Decides what follows a bad step.

    `capsule` (step, facts, state) -> text keeps what is needed to see the step again.
    """

    def __init__(
        self,
        config: guard.RecoveryConfig,
        health: "Health",
        watch: guard.Watch,
        capsule: Callable[[int, Mapping[str, Any], Any], str],
    ):
        self._config, self._health, self._capsule = config, health, capsule
        self.watch = watch

    def bad_step(
        self,
        step: int,
        scalars: Mapping[str, float],
        limit: float,
        examples: str,
        state: Any,
    ) -> None:
        """Returns if the step is skipped; else UserError, or Rewind.

        `state` is what the step was computed from.
        """
        c, watch = self._config, self.watch
        why = f"{guard.problem(scalars, limit)} on examples {examples}"
        facts = {"why": why, "measured": dict(scalars), "examples": examples}
        why += self._capsule(step, facts, state)
        if c.action == "stop" or watch.bad >= c.most:
            if c.action != "stop":
                why += f"; it is bad step {watch.bad + 1}, recovery.most={c.most}"
            raise self._health.stopped(step, why, after=step - 1)
        watch.bad += 1
        print(f"step {step}: {why}", flush=True)
        if c.action == "rewind":
            raise Rewind(step)
        print(f"step {step}: its update is skipped", flush=True)

    def check_state(self, state: Any, step: int) -> None:
        """UserError, or Rewind, if a state that is about to be saved is not finite."""
        try:
            self._health.check_state(state, step)
        except UserError as error:
            watch = self.watch
            if self._config.action != "rewind" or watch.bad >= self._config.most:
                raise
            watch.bad += 1
            print(error, flush=True)
            raise Rewind(step) from error


def rewind(
    workdir: str,
    checkpointer: Checkpointer,
    watch: guard.Watch,
    config: guard.RecoveryConfig,
    reason: Rewind,
) -> int:
    """Goes back to the newest checkpoint before the last steps up to the bad one, whose
    batches (config.leave_out) are left out from now on; the step, 0 if none is saved.

    If all are younger, to the oldest: fewer batches are left out then.
    """
    checkpointer.wait()
    bad, count = reason.step, config.leave_out
    steps = [s for s in checkpointer.steps() if s < bad]
    step = max((s for s in steps if s <= bad - count), default=min(steps, default=0))
    out = [watch.position(s - 1) for s in range(max(step, bad - count) + 1, bad + 1)]
    set_aside(workdir, checkpointer, step)
    watch.left_out = sorted({*watch.left_out, *out})
    shown = ", ".join(map(str, watch.left_out))
    print(f"going back to step {step}; batches left out: {shown}", flush=True)
    return step


class Health:
    """Stops a run whose numbers are not finite; what it has saved can be gone on with.

    A loss belongs to the parameters before the update, so a step can ruin what is
    saved after it. `start` is the step after which this process went on.
    """

    def __init__(self, checkpointer: Checkpointer, start: int):
        self._checkpointer, self._start = checkpointer, start

    def check_state(self, state: Any, step: int) -> None:
        """UserError if a state that is about to be saved has a NaN or an infinity."""
        if bad := not_finite(state):
            what = f"the update made {some(bad)} infinite or NaN; it was not saved"
            raise self.stopped(step, what, after=step)

    def check_evaluation(self, scalars: Mapping[str, Any], step: int) -> None:
        """UserError if the loss of an evaluation after a step is not finite."""
        for name, value in scalars.items():
            if name.endswith("/loss") and not math.isfinite(value):
                raise self.stopped(step, f"{name} is {value}", after=step)

    def stopped(self, step: int, what: str, after: int) -> UserError:
        """What to tell; the state after step `after` cannot be gone on with.

        If this process saved that state, it is set aside. Of earlier processes' nothing
        is: a setting of today, such as a learning rate, may be the cause.
        """
        checkpointer = self._checkpointer
        checkpointer.wait()
        steps = checkpointer.steps()
        if steps[-1:] == [after] and after > self._start and len(steps) > 1:
            path = checkpointer.set_aside([after])[0]
            what += f"; checkpoint {after} led to it and is now {path}"
            steps = checkpointer.steps()
        where = f"the newest checkpoint is {steps[-1]}" if steps else "nothing is saved"
        if len(steps) > 1:
            where += f", --resume={steps[-2]} goes on after an older one"
        return UserError(f"step {step}: {what}; {where}: {ADVICE}")


def go_back(
    workdir: str, checkpointer: Checkpointer, config: ExperimentConfig, step: int
) -> None:
    """Sets aside the checkpoints, numbers and scores after `step`; nothing is deleted.

    The same command started again goes on: what was trained with this config after the
    same step stays. 0 begins anew. UserError if there is no such step.
    """
    steps = checkpointer.steps()
    newest: Mapping[str, Any] = {}
    if steps:
        # It may be damaged: perhaps that is why somebody goes back.
        with contextlib.suppress(CheckpointError):
            newest = checkpointer.meta_of(steps[-1])
    if newest.get("resume") == step and newest["config"] == schema.to_json(config):
        print(f"resume={step}: done before; going on after step {steps[-1]}")
        return
    if step not in steps and step != 0:
        shown = (
            f"name one of {', '.join(map(str, steps))}" if steps else "none is saved"
        )
        raise UserError(f"--resume={step}: no checkpoint of that step; {shown}")
    set_aside(workdir, checkpointer, step)


def check_history(
    workdir: str, checkpointer: Checkpointer, config: ExperimentConfig
) -> None:
    """UserError if metrics show that steps were saved and no checkpoint is there.

    `config` is that of the last start. What was killed before its first save begins
    anew, and says so.
    """
    lines = [x for x in metrics.read_lines(workdir) if x["step"] > 0]
    if not lines or checkpointer.latest() is not None:
        return
    last = max(line["step"] for line in lines)
    every = config.checkpoint.every, config.evaluation.every
    # A save has ended when the next one begins.
    second = sorted({k * n for n in every for k in (1, 2)})[1]
    if last > second or any("test/loss" in line for line in lines):
        raise UserError(
            f"{os.path.join(workdir, metrics.FILE)}: it goes up to step {last}, and no "
            f"checkpoint is in {checkpointer.directory}; put them back, name another "
            "workdir, or begin anew with --resume=0, which sets aside what is there"
        )
    print(f"it ended before its first save: steps 1 to {last} are done again")


def set_aside(workdir: str, checkpointer: Checkpointer, step: int) -> None:
    """Moves what a run has of later steps to its folder set_aside/."""
    later = [s for s in checkpointer.steps() if s > step]
    scores = checkpointer.forget(step)
    keep_lines(workdir, "scores.jsonl", [{"step": s} | scores[s] for s in scores])
    for path in checkpointer.set_aside(later):
        print(f"set aside: {path}")
    lost = [line for line in metrics.read_lines(workdir) if line["step"] > step]
    keep_lines(workdir, metrics.FILE, lost)


def keep_lines(workdir: str, name: str, lines: list[Mapping[str, Any]]) -> None:
    """Appends lines to a file of that name in set_aside/."""
    if not lines or not hosts.here().is_first:
        return
    folder = os.path.join(workdir, "set_aside")
    files.make_folder(folder)
    text = "".join(files.dumps(line) + "\n" for line in lines)
    files.append(os.path.join(folder, name), text)
