"""Bad steps: the rule that finds them, and a step that leaves the state alone then.

A step is bad if its loss or gradient is not finite, or if the loss jumps. The compiled
step finds out before it changes anything, and the steps behind it, which may be under
way when the host hears of it, find a state that has not come to them and change nothing
either. So the host holds the very parameters that the bad step was computed from.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from triform.runtime.metrics import Mean

Tree = Any
ACTIONS = ("stop", "skip", "rewind")
DONE = "done"  # metric of a guarded step: 1 if it changed the state


@dataclasses.dataclass
class RecoveryConfig:
    """What to do after a bad step: non-finite loss or gradient, or a spike."""

    action: str = "stop"  # 'stop', 'skip' the update, or 'rewind' to a checkpoint
    # A loss this many standard deviations above the mean of the last `window` steps is
    # a spike; 0: no check.
    spike: float = 0.0
    window: int = 100  # number of these steps; no check before there are as many
    leave_out: int = 2  # rewind: batches left out, up to the bad step's batch
    most: int = 10  # skip, rewind: bad steps allowed; one more stops the run

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if self.action not in ACTIONS:
            raise ValueError(
                f"recovery.action={self.action!r}: expected one of {', '.join(ACTIONS)}"
            )
        least = {"spike": 0, "window": 2, "leave_out": 1, "most": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise ValueError(f"recovery.{name}={value}: must be at least {low}")


def guarded(step: Callable, config: RecoveryConfig) -> Callable:
    """A train step of (state, what `feed` gives, across) with the metric DONE.

    Bad steps, and all after one, leave the state as it is. Where steps are skipped, an
    update that would make the state infinite or NaN is bad, too: nobody looks again.
    """

    def run(state: Tree, fed: Mapping[str, Any], across: Any) -> tuple[Tree, Tree]:
        new, measured = step(state, fed["batch"], across)
        loss, norm = measured["loss"].total, measured["grad_norm"].total
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= fed["limit"])
        good &= state.step == fed["step"] - 1
        if config.action == "skip":
            for x in jax.tree.leaves((new.params, new.extra, new.opt_state)):
                if jnp.issubdtype(x.dtype, jnp.inexact):
                    good &= jnp.isfinite(x).all()

        def choose(x: jax.Array, old: jax.Array) -> jax.Array:
            return old if x is old else jnp.where(good, x, old)

        done = Mean(good.astype(jnp.float32), jnp.float32(1))
        return jax.tree.map(choose, new, state), {**measured, DONE: done}

    return run


def feed(placement: Any, batch: Tree, step: int, limit: float) -> dict[str, Any]:
    """What a guarded step takes beside the state."""
    same = placement.same
    return {
        "batch": batch,
        "step": same(np.int32(step)),
        "limit": same(np.float32(limit)),
    }


@jax.jit
def _next(step: jax.Array) -> jax.Array:
    return step + 1


def passed(state: Tree) -> Tree:
    """The state with the step that it was left at counted as done."""
    return state.replace(step=jax.device_put(_next(state.step), state.step.sharding))


def problem(scalars: Mapping[str, float], limit: float) -> str:
    """Why a step was bad."""
    for name in ("train/loss", "train/grad_norm"):
        if not math.isfinite(scalars[name]):
            return f"{name} is {scalars[name]}"
    if scalars["train/loss"] > limit:
        return (
            f"train/loss is {scalars['train/loss']:.6g}, above {limit:.6g} "
            "(recovery.spike)"
        )
    return "the update makes parameters or moments infinite or NaN"


class Watch:
    """What is known of a run's steps: from `saved`, the JSON beside a checkpoint."""

    def __init__(self, config: RecoveryConfig, saved: Mapping[str, Any]):
        self._config = config
        self.bad = int(saved.get("bad", 0))
        self.left_out: list[int] = sorted(saved.get("left_out", ()))  # batches
        self.losses = list(saved.get("losses", ()))  # (step, loss) of good steps

    def saved(self) -> dict[str, Any]:
        """For the JSON beside a checkpoint."""
        return {"bad": self.bad, "left_out": self.left_out, "losses": self.losses}

    def take(self, step: int, loss: float) -> None:
        """Notes the loss of a good step."""
        if self._config.spike:
            self.losses.append([step, loss])
            del self.losses[: -self._config.window - 2]

    def limit(self, step: int) -> float:
        """The largest loss of a step that is none too many.

        From steps up to the last but one: the last may be under way. So it is the same
        however a run was interrupted.
        """
        c = self._config
        known = [x for at, x in self.losses if at <= step - 2][-c.window :]
        if not c.spike or len(known) < c.window:
            return math.inf
        return float(np.mean(known) + c.spike * np.std(known))

    def position(self, step: int) -> int:
        """Number of the batch that a step takes: steps and batches count from 0."""
        for batch in self.left_out:
            step += batch <= step
        return step
