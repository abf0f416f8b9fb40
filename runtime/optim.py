"""Schedules, the decay mask by parameter path, and the optimiser chain."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from triform.runtime.parameters import ROWS, Rows, axes_of
from triform.runtime.paths import path_name

Schedule = Callable[[jax.Array | int], jax.Array]


def rsqrt(peak: float, warmup: int, total: int, floor: float) -> Schedule:
    """Linear to `peak` over `warmup` steps, then peak * sqrt(warmup / step).

    Vaswani et al. 2017, eq. 3, where peak = (D * warmup) ** -0.5.
    """
    return lambda t: peak * jnp.minimum((t + 1) / warmup, jnp.sqrt(warmup / (t + 1)))


def cosine(peak: float, warmup: int, total: int, floor: float) -> Schedule:
    """Linear warm-up, then a half cosine to floor * peak at `total`."""

    def decay(x: jax.Array) -> jax.Array:
        return floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * x))

    return _warmup_then(peak, warmup, total, decay)


def linear(peak: float, warmup: int, total: int, floor: float) -> Schedule:
    """Linear warm-up, then linear to floor * peak at `total`."""
    return _warmup_then(peak, warmup, total, lambda x: 1 - (1 - floor) * x)


def constant(peak: float, warmup: int, total: int, floor: float) -> Schedule:
    """Linear warm-up, then `peak`."""
    return _warmup_then(peak, warmup, total, jnp.ones_like)


def wsd(peak: float, warmup: int, total: int, floor: float) -> Schedule:
    """Warm-up, stable, and a linear decay over the last fifth (Hu et al. 2024, 4)."""
    return _warmup_then(
        peak, warmup, total, lambda x: 1 - (1 - floor) * jnp.clip((x - 0.8) / 0.2, 0, 1)
    )


def _warmup_then(peak: float, warmup: int, total: int, shape: Callable) -> Schedule:
    """Step 0 gives peak / warmup, not zero, so that the first update counts."""

    def schedule(t: jax.Array | int) -> jax.Array:
        x = jnp.clip((t - warmup) / _at_least_one(total - warmup), 0.0, 1.0)
        return peak * jnp.minimum((t + 1) / _at_least_one(warmup), 1.0) * shape(x)

    return schedule


def _at_least_one(steps: Any) -> Any:
    """max(1, steps), also of a number that is traced."""
    return max(1, steps) if isinstance(steps, int) else jnp.maximum(1, steps)


# fn(peak, warmup, total, floor) -> schedule
SCHEDULES = {
    "rsqrt": rsqrt,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}


@dataclasses.dataclass
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: str = "adam"  # the optimiser
    learning_rate: float = 1e-3  # peak learning rate of the schedule
    schedule: str = "rsqrt"  # shape of the learning rate over the steps
    warmup_steps: int = 4000  # steps over which the rate grows linearly to its peak
    floor: float = 0.0  # final rate as a share of the peak (cosine, linear, wsd)
    b1: float = 0.9  # not adafactor; in Muon, for the parameters of Adam
    b2: float = 0.98  # as b1; default: Vaswani et al. 2017, 5.3
    eps: float = 1e-9  # added to denominators (adam, adamw, muon)
    weight_decay: float = 0.0  # decoupled; never on biases and norm scales; 0: off
    clip_norm: float = 0.0  # largest global norm of the gradient; 0: no clipping
    accumulate: int = 1  # micro-batches per update (gradient accumulation)
    # Regular expressions that match whole paths of trained parameters; others are
    # frozen.
    train: tuple[str, ...] = (".*",)
    ema_decay: float = 0.0  # moving average of parameters for evaluation; 0: off

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""

        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"optim.{name}={getattr(self, name)!r}: {rule}")

        for name, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            rule = f"expected one of {', '.join(table)}"
            require(getattr(self, name) in table, name, rule)
        require(
            0 < self.learning_rate < float("inf"),
            "learning_rate",
            "must be positive and finite",
        )
        require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        require(
            self.schedule != "rsqrt" or self.warmup_steps > 0,
            "warmup_steps",
            "must be positive with schedule='rsqrt', whose peak it places",
        )
        require(0 <= self.floor <= 1, "floor", "must lie in [0, 1]")
        for name in ("b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)")
        require(self.eps > 0, "eps", "must be positive")
        require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        require(
            self.weight_decay == 0 or self.name != "adam",
            "weight_decay",
            "adam has none; set optim.name=adamw",
        )
        require(self.clip_norm >= 0, "clip_norm", "must not be negative; 0 is off")
        require(self.accumulate >= 1, "accumulate", "must be at least 1")
        for pattern in self.train:
            try:
                re.compile(pattern)
            except re.error as error:
                require(False, "train", f"{pattern!r} is no pattern ({error})")


def decay_mask(rows: Rows) -> Callable[[Any], Any]:
    """(params) -> True where weight decay applies: all but biases and norm scales.

    By path, never by rank: q/k/v biases are matrices and scanned trunks add an axis.
    """
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, x: axes_of(path_name(path), x.shape, rows).decays, params
    )


def _adam(c: OptimConfig, rate: Schedule, rows: Rows) -> optax.GradientTransformation:
    return optax.adam(rate, c.b1, c.b2, c.eps)


def _adamw(c: OptimConfig, rate: Schedule, rows: Rows) -> optax.GradientTransformation:
    decay = {"weight_decay": c.weight_decay, "mask": decay_mask(rows)}
    return optax.adamw(rate, c.b1, c.b2, c.eps, **decay)


def _adafactor(
    c: OptimConfig, rate: Schedule, rows: Rows
) -> optax.GradientTransformation:
    # Shazeer & Stern 2018. Optax's own decay is not scaled by the rate: ours is.
    # It scales by the size of each array, so a scanned trunk, whose arrays hold all
    # layers, is not updated as a looped one.
    core = optax.adafactor(
        None, multiply_by_parameter_scale=True, decay_rate=0.8, momentum=None
    )
    return optax.chain(
        core,
        optax.add_decayed_weights(-c.weight_decay, decay_mask(rows)),
        # adafactor's updates already point downhill.
        optax.scale_by_schedule(rate),
    )


def _lion(c: OptimConfig, rate: Schedule, rows: Rows) -> optax.GradientTransformation:
    decay = {"weight_decay": c.weight_decay, "mask": decay_mask(rows)}
    return optax.lion(rate, c.b1, c.b2, **decay)


def _muon(c: OptimConfig, rate: Schedule, rows: Rows) -> optax.GradientTransformation:
    # Optax's Muon would leave what it gives to Adam without decay: ours is added after.
    core = optax.contrib.muon(
        1.0,
        adam_b1=c.b1,
        adam_b2=c.b2,
        eps=c.eps,
        muon_weight_dimension_numbers=muon_dimensions(rows),
    )
    return optax.chain(
        core,
        optax.add_decayed_weights(-c.weight_decay, decay_mask(rows)),
        optax.scale_by_schedule(rate),
    )


# fn(config, schedule, rows of parameter axes) -> transformation
OPTIMIZERS = {
    "adam": _adam,
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def muon_dimensions(rows: Rows) -> Callable[[Any], Any]:
    """(params) -> dimensions of Muon's matrix per parameter; None leaves it to Adam.

    Kernels of hidden layers are matrices from inputs to outputs: query, key and value
    [D, H, E] as D x (H E), out [H, E, D] as (H E) x D (Jordan et al. 2024). Optax's
    default, by rank, has this the wrong way round.
    """

    def dimensions(path: tuple, x: jax.Array) -> Any:
        matrix = axes_of(path_name(path), x.shape, rows).matrix()
        return matrix and optax.contrib.MuonDimensionNumbers(*matrix)

    return lambda params: jax.tree_util.tree_map_with_path(dimensions, params)


class EmaState(NamedTuple):
    """Updates so far, and the moving average of the parameters."""

    count: jax.Array
    average: Any


def parameter_ema(decay: float) -> optax.GradientTransformation:
    """Keeps average <- d * average + (1 - d) * parameters, updates unchanged.

    Must come last in the chain: it sees the parameters as they will be. d grows as
    (1 + t) / (10 + t) up to `decay`, so that the start is forgotten (as in TF).
    """

    def update(updates, state, params):
        count, average = state.count, state.average
        d = jnp.minimum(1 * decay, (1 + count) / (10 + count))  # decay may be traced
        average = jax.tree.map(
            lambda a, p, u: d * a + (1 - d) * (p + u), average, params, updates
        )
        return updates, EmaState(count + 1, average)

    def init(params):
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    return optax.GradientTransformation(init, update)


def evaluation_params(params: Any, opt_state: Any) -> Any:
    """The moving average if the chain keeps one, else the parameters."""

    def is_ema(x: Any) -> bool:
        return isinstance(x, EmaState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_ema)
    return next((x.average for x in leaves if is_ema(x)), params)


def build(
    config: OptimConfig, steps: int, rows: Rows = ROWS
) -> optax.GradientTransformation:
    """The chain: clip -> optimiser with schedule -> moving average of parameters.

    `rows` is the table of parameter axes. The shape of the state does not depend on
    clipping, which may be switched on and off between two starts of a run.
    """
    rate = learning_rate(config, steps)
    clip = optax.clip_by_global_norm(1 * config.clip_norm)  # which may be traced
    parts = [clip if config.clip_norm else optax.identity()]
    parts.append(OPTIMIZERS[config.name](config, rate, rows))
    if config.ema_decay:
        parts.append(parameter_ema(config.ema_decay))
    return optax.chain(*parts)


def learning_rate(config: OptimConfig, steps: int) -> Schedule:
    """The schedule of a run of `steps` updates."""
    make = SCHEDULES[config.schedule]
    return make(config.learning_rate, config.warmup_steps, steps, config.floor)


def partition(params: Any, patterns: Sequence[str]) -> tuple[Any, Any]:
    """(trained, frozen) parameters: a path is trained if a pattern matches all of it.

    Raises ValueError if nothing is trained.
    """
    flat = flatten_dict(params, sep="/")
    trained = {
        k: x for k, x in flat.items() if any(re.fullmatch(p, k) for p in patterns)
    }
    if not trained:
        raise ValueError(
            f"optim.train={tuple(patterns)!r}: matches none of {len(flat)} parameters, "
            f"such as {next(iter(flat))!r}; use patterns that match whole paths"
        )
    rest = {k: x for k, x in flat.items() if k not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(rest, sep="/")


def join(trained: Any, frozen: Any) -> Any:
    """The inverse of `partition`."""
    both = flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/")
    return unflatten_dict(both, sep="/")
