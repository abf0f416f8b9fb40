"""Classes from labels and from a teacher's probabilities (Hinton et al. 2015)."""

import dataclasses

import jax
import jax.numpy as jnp

from triform.runtime.metrics import Mean, Metrics
from triform.tasks.base import Array, Batch, Context, Outputs, Scalars
from triform.tasks.prediction import Classification, PredictionConfig


@dataclasses.dataclass
class LabelDistillationConfig(PredictionConfig):
    """Predict batch['label'], and what a teacher says of it."""

    label_share: float = 0.5  # weight of the cross-entropy with the labels
    teacher_share: float = 0.5  # weight of the divergence from the teacher
    temperature: float = 2.0  # the logits of both models are divided by it

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        for name in ("label_share", "teacher_share"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"task.{name}={getattr(self, name)}: must not be negative; 0 "
                    "switches the term off"
                )
        if self.temperature <= 0:
            raise ValueError(f"task.temperature={self.temperature}: must be positive")


class LabelDistillation(Classification):
    """Cross-entropy of the label, plus T^2 KL(teacher, student) at temperature T.

    Both in nats per real row; T^2 keeps gradients of one size (2.1 in the paper).
    """

    needs = ("label", "teacher_label")
    reports = (
        "loss",
        "label_loss",
        "teacher_loss",
        "accuracy",
        "teacher_accuracy",
        "ece",
    )

    def weights(self, batch: Batch) -> Scalars:
        """The number of real rows, twice."""
        return super().weights(batch) | {"teacher": self._weights(batch).sum()}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over rows."""
        heat = self.config.temperature
        wanted = jax.nn.log_softmax(outputs["teacher_label"] / heat)
        given = jax.nn.log_softmax(outputs["label"] / heat)
        divergence = heat**2 * (jnp.exp(wanted) * (wanted - given)).sum(-1)
        total = (divergence * self._weights(batch)).sum()
        return super().terms(outputs, batch, ctx) | {"teacher": total}

    def coefficients(self, step: Array | int) -> Scalars:
        """The shares."""
        return {"label": self.config.label_share, "teacher": self.config.teacher_share}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Also the teacher's accuracy."""
        taught = self._parts({"label": outputs["teacher_label"]}, batch, False)
        accuracy = Mean.of(taught.correct, self._weights(batch))
        found = super().metrics(outputs, batch, ctx)
        return found | {"teacher_accuracy": accuracy}
