"""Numbers by least squares: one per row."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from triform.tasks.base import Batch, Context, Outputs, Scalars, Task


@dataclasses.dataclass
class RegressionConfig:
    """Predict batch['label'], a number for the row, by least squares."""

    def validate(self) -> None:
        """There is nothing to check."""


class Regression(Task):
    """Squared error of label [B], averaged over the real rows."""

    fields, needs = ("label", "label_weights"), ("label",)
    numbers = ("label",)
    reports = ("loss", "pearson", "spearman")

    def weights(self, batch: Batch) -> Scalars:
        """The number of real rows."""
        return {"label": batch["label_weights"].sum()}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Squared errors, summed over rows."""
        errors = (outputs["label"][..., 0] - batch["label"]) ** 2
        return {"label": (errors * batch["label_weights"]).sum()}

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, jnp.ndarray]:
        """loss [B] (squared error), number [B] (predicted), true_number [B]."""
        number = outputs["label"][..., 0]
        loss = (number - batch["label"]) ** 2
        return {"loss": loss, "number": number, "true_number": batch["label"]}

    def score(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Pearson's and Spearman's correlation; NaN where one side does not vary."""
        found, true = rows["number"], rows["true_number"]
        return {
            "pearson": correlation(found, true),
            "spearman": correlation(ranks(found), ranks(true)),
        }


def ranks(x: np.ndarray) -> np.ndarray:
    """float64 [N]: ranks of the numbers x [N], from 1; equal ones share theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of x and y [N], centred in float64; NaN without spread."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / spread, -1, 1)) if spread else math.nan
