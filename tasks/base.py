"""Task: what is minimised, measured and predicted. A task takes a model as a value.

The objective is sum_k c_k(step) * total_k / weight_k over the whole global batch.
Weights follow from the batch alone, so the gradients of micro-batches, devices and
hosts are simply added: any sum of means is exact.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from triform.runtime.metrics import Metrics

Array = jax.Array
Batch = Mapping[str, Array]
Outputs = Mapping[str, Any]  # of the model, by name; "losses" is what modules sowed
Variables = Mapping[str, Any]  # {"params": ..., other collections}
Scalars = Mapping[str, Array | float]


@struct.dataclass
class Context:
    """What a task may know besides variables and batch."""

    step: Array  # int32 []: updates done
    rngs: Mapping[str, Array]  # named streams; {} in evaluation
    train: bool = struct.field(pytree_node=False, default=False)
    # [B, ...] of this device -> rows of all devices, for terms that couple rows.
    all_rows: Callable[[Array], Array] = struct.field(
        pytree_node=False, default=lambda x: x
    )


class Task:
    """Base of all objectives.

    Collections besides "params": `losses` hold what modules sow in one pass and are
    given to `terms` as outputs["losses"]; `stats` is state that a training pass
    updates, micro-batch after micro-batch, and is averaged over devices.
    """

    fields: tuple[str, ...] = ()  # of the batch that the task reads
    needs: tuple[str, ...] = ()  # outputs of the model
    numbers: tuple[str, ...] = ()  # those that are numbers, not scores of classes
    reports: tuple[str, ...] = ("loss",)  # names that evaluation reports
    couples_rows = False  # does a term compare rows with one another?

    def __init__(self, config: Any, model: nn.Module):
        self.config = config
        self.model = model

    def init(self, rng: Array, batch: Batch) -> Variables:
        """Fresh float32 parameters and other collections."""
        variables = self.model.init(rng, batch)
        passing = ("losses", "intermediates")
        return {k: v for k, v in variables.items() if k not in passing}

    def outputs(
        self, variables: Variables, batch: Batch, ctx: Context
    ) -> tuple[Outputs, Variables]:
        """(the model's outputs by name, collections other than params, updated)."""
        others = [name for name in variables if name != "params"]
        mutable = ["losses", *(others if ctx.train else ())]
        outputs, updates = self.model.apply(
            variables, batch, rngs=dict(ctx.rngs), mutable=mutable
        )
        losses = updates.get("losses", {})
        kept = {name: updates.get(name, variables[name]) for name in others}
        return {**outputs, "losses": losses}, kept

    def weights(self, batch: Batch) -> Scalars:
        """{term: its denominator}, from the batch alone."""
        raise NotImplementedError

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """{term: its sum over the batch}."""
        raise NotImplementedError

    def coefficients(self, step: Array | int) -> Scalars:
        """{term: its factor in the objective at this step}; terms left out have 1."""
        return {}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Further metrics by name, as totals and weights."""
        return {}

    def predict(self, outputs: Outputs, batch: Batch) -> Mapping[str, Array]:
        """{name: array [B, ...]}: what is kept of every example."""
        return {}

    def answer(self, outputs: Outputs, batch: Batch) -> Mapping[str, Array]:
        """{name: array [B, ...]}: what is said of a request, of which nothing is known.

        As `predict`; its losses mean nothing.
        """
        return self.predict(outputs, batch)

    def score(self, rows: Mapping[str, Any]) -> Mapping[str, float]:
        """Metrics of all examples' predictions, arrays [N, ...] on the host."""
        return {}


def over(
    logits: Any, function: Callable[..., Any], *others: Array, key: Any = None
) -> Any:
    """function(logits, *others), one part after another of logits that are no array.

    These have `map` (models/logits.py). `function` treats all but the last axis alike.
    """
    if hasattr(logits, "map"):
        return logits.map(function, *others, key=key)
    return function(logits, *others)


def likeliest(logits: Array) -> Array:
    """int32 [...] of logits [..., V]."""
    return logits.argmax(-1).astype(jnp.int32)


def candidates(logits: Array, count: int = 5) -> dict[str, Array]:
    """{candidates: int32 [..., n], shares: float32 [..., n]} of logits [..., V]: the
    likeliest classes, descending, and their probabilities.
    """
    shares = jax.nn.softmax(logits, -1)
    shares, best = jax.lax.top_k(shares, min(count, logits.shape[-1]))
    return {"candidates": best.astype(jnp.int32), "shares": shares}


def row_mean(values: Array, weights: Array) -> Array:
    """float32 [B]: weighted mean of each row of values [B, ...]; 0 without weight."""
    axes = tuple(range(1, values.ndim))
    total = (values * weights).sum(axes)
    return total / jnp.maximum(weights.sum(axes), 1e-8)
