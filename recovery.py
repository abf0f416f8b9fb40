"""When numbers are no longer finite: what is saved, and going back to an older step."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.runtime import files, metrics
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import CheckpointError, UserError
from triform.runtime.leaves import not_finite, some

ADVICE = (
    "lower optim.learning_rate, set optim.clip_norm=1 or lengthen optim.warmup_steps, "
    "and start again"
)


class Health:
    """Stops a run whose numbers are not finite; what it has saved can be gone on with.

    A loss belongs to the parameters before the update, so a step can ruin what is
    saved after it. `start` is the step after which this process went on.
    """

    def __init__(self, checkpointer: Checkpointer, start: int):
        self._checkpointer, self._start = checkpointer, start

    def check_step(
        self, scalars: Mapping[str, float], step: int, examples: Callable[[], str]
    ) -> None:
        """UserError if the loss or gradient of a step is not finite."""
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(scalars[name]):
                what = f"{name} is {scalars[name]} on examples {examples()}"
                raise self._stop(step, what, after=step - 1)

    def check_state(self, state: Any, step: int) -> None:
        """UserError if a state that is about to be saved has a NaN or an infinity."""
        if bad := not_finite(state):
            what = f"the update made {some(bad)} infinite or NaN; it was not saved"
            raise self._stop(step, what, after=step)

    def check_evaluation(self, scalars: Mapping[str, Any], step: int) -> None:
        """UserError if the loss of an evaluation after a step is not finite."""
        for name, value in scalars.items():
            if name.endswith("/loss") and not math.isfinite(value):
                raise self._stop(step, f"{name} is {value}", after=step)

    def _stop(self, step: int, what: str, after: int) -> UserError:
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
            where += f", --from_step={steps[-2]} goes on after an older one"
        return UserError(f"step {step}: {what}; {where}: {ADVICE}")


def go_back(
    workdir: str, checkpointer: Checkpointer, config: ExperimentConfig, step: int
) -> None:
    """Sets aside the checkpoints and numbers after `step`; nothing is deleted.

    The same command started again goes on: what was trained with this config after the
    same step stays. UserError if there is no such step.
    """
    steps = checkpointer.steps()
    newest: Mapping[str, Any] = {}
    if steps:
        # It may be damaged: perhaps that is why somebody goes back.
        with contextlib.suppress(CheckpointError):
            newest = checkpointer.meta_of(steps[-1])
    if newest.get("from_step") == step and newest["config"] == schema.to_json(config):
        print(f"from_step={step}: done before; going on after step {steps[-1]}")
        return
    if step not in steps:
        shown = ", ".join(map(str, steps)) or "none is saved"
        raise UserError(
            f"--from_step={step}: no checkpoint of that step; name one of {shown}"
        )
    later = [s for s in steps if s > step]
    for path in checkpointer.set_aside(later):
        print(f"set aside: {path}")
    lost = [line for line in metrics.read_lines(workdir) if line["step"] > step]
    if lost:
        folder = os.path.join(workdir, "set_aside")
        files.make_folder(folder)
        text = "".join(files.dumps(line) + "\n" for line in lost)
        files.append(os.path.join(folder, metrics.FILE), text)
