"""BERT's pre-training: masked tokens, and whether sentence B follows sentence A."""

import dataclasses

import jax.numpy as jnp

from triform.runtime.metrics import Mean, Metrics
from triform.tasks.base import (
    Batch,
    Context,
    Outputs,
    Scalars,
    Task,
    candidates,
    over,
    row_mean,
)
from triform.tasks.prediction import CrossEntropy, PredictionConfig

# Term -> (field and output, weights).
TERMS = {"masked": ("targets", "weights"), "next": ("label", "label_weights")}


@dataclasses.dataclass
class PretrainingConfig(PredictionConfig):
    """Predict masked tokens ('targets') and whether B follows A ('label')."""


class Pretraining(Task):
    """The sum of the two mean losses (Devlin et al. 2019, 3.1)."""

    fields = ("targets", "weights", "label", "label_weights")
    needs = ("targets", "label")
    reports = ("loss", "masked_loss", "masked_accuracy", "next_loss", "next_accuracy")

    def weights(self, batch: Batch) -> Scalars:
        """Masked tokens, and rows."""
        return {term: batch[w].sum() for term, (_, w) in TERMS.items()}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over masked tokens and over rows."""

        def total(target: str, weights: str) -> jnp.ndarray:
            parts = CrossEntropy.of(
                outputs[target], batch[target], self.config, ctx.train
            )
            return (parts.loss * batch[weights]).sum()

        return {term: total(*names) for term, names in TERMS.items()}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """The accuracy of both."""
        found = {}
        for term, (target, weights) in TERMS.items():
            parts = CrossEntropy.of(outputs[target], batch[target], self.config, False)
            found[f"{term}_accuracy"] = Mean.of(parts.correct, batch[weights])
        return found

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, jnp.ndarray]:
        """loss [B] in nats per masked token, label [B]."""
        masked = CrossEntropy.of(
            outputs["targets"], batch["targets"], self.config, False
        )
        return {
            "loss": row_mean(masked.nll, batch["weights"]),
            "label": outputs["label"].argmax(-1).astype(jnp.int32),
        }

    def answer(self, outputs: Outputs, batch: Batch) -> dict[str, jnp.ndarray]:
        """The likeliest candidates of every masked token [B, P, n]."""
        return over(outputs["targets"], candidates)
