"""A number for every token, by least squares."""

import dataclasses

import jax.numpy as jnp

from triform.runtime.metrics import Mean, Metrics
from triform.tasks.base import Array, Batch, Context, Outputs, Scalars, Task, row_mean


@dataclasses.dataclass
class TokenRegressionConfig:
    """Predict batch['targets'], numbers [B, L], by least squares."""

    def validate(self) -> None:
        """There is nothing to check."""


class TokenRegression(Task):
    """Squared error of targets [B, L], averaged over their weights."""

    fields, needs = ("targets", "weights"), ("targets",)
    numbers = ("targets",)
    reports = ("loss", "absolute_error")

    def weights(self, batch: Batch) -> Scalars:
        """The sum of the weights of all targets."""
        return {"token": batch["weights"].sum()}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Squared errors, summed over targets."""
        errors = self._errors(outputs, batch) ** 2
        return {"token": (errors * batch["weights"]).sum()}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """The mean absolute error."""
        errors = jnp.abs(self._errors(outputs, batch))
        return {"absolute_error": Mean.of(errors, batch["weights"])}

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] (mean squared error), targets [B, L] (numbers), weights [B, L]."""
        weights = batch["weights"]
        loss = row_mean(self._errors(outputs, batch) ** 2, weights)
        numbers = outputs["targets"][..., 0]
        return {"loss": loss, "targets": numbers, "weights": weights}

    def _errors(self, outputs: Outputs, batch: Batch) -> Array:
        return outputs["targets"][..., 0] - batch["targets"]
