"""Texts and the codes of pictures after them (Ramesh et al. 2021, 2.2)."""

import dataclasses

import jax

from triform.runtime.metrics import Mean, Metrics, Perplexity
from triform.tasks.base import Batch, Context, Outputs, Scalars, Task, row_mean
from triform.tasks.prediction import CrossEntropy, PredictionConfig

Array = jax.Array


@dataclasses.dataclass
class TextToImagePredictionConfig(PredictionConfig):
    """Predict the next id of a text, and the codes of a picture after it."""

    text_share: float = 1 / 8  # weight of the mean loss of text tokens
    code_share: float = 7 / 8  # weight of the mean loss of image codes

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        for name in ("text_share", "code_share"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"task.{name}={getattr(self, name)}: must not be negative; 0 "
                    "switches the term off"
                )


class TextToImagePrediction(Task):
    """Nats per real token of text, and nats per code."""

    fields = ("text", "text_segments", "codes", "code_weights")
    needs = ("text", "codes")
    reports = ("loss", "text_loss", "code_loss", "code_perplexity", "code_accuracy")

    def weights(self, batch: Batch) -> Scalars:
        """Tokens of texts but the first, which nothing predicts; and codes."""
        return {k: weights.sum() for k, (_, weights) in _targets(batch).items()}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over tokens and over codes."""
        return {
            k: (self._parts(k, outputs, batch, ctx.train).loss * weights).sum()
            for k, (_, weights) in _targets(batch).items()
        }

    def coefficients(self, step: Array | int) -> Scalars:
        """The shares."""
        return {"text": self.config.text_share, "code": self.config.code_share}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Of codes: perplexity and accuracy."""
        parts = self._parts("code", outputs, batch, False)
        weights = batch["code_weights"]
        return {
            "code_perplexity": Perplexity.of(parts.nll, weights),
            "code_accuracy": Mean.of(parts.correct, weights),
        }

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] in nats per code, text_loss [B] per token."""
        losses = {
            k: row_mean(self._parts(k, outputs, batch, False).nll, weights)
            for k, (_, weights) in _targets(batch).items()
        }
        return {"loss": losses["code"], "text_loss": losses["text"]}

    def _parts(self, kind: str, outputs: Outputs, batch: Batch, train: bool):
        logits = outputs["codes" if kind == "code" else kind]
        targets = _targets(batch)[kind][0]
        return CrossEntropy.of(logits, targets, self.config, train)


def _targets(batch: Batch) -> dict[str, tuple[Array, Array]]:
    """Term -> (ids, weights), each [B, n]."""
    text = batch["text"][:, 1:], batch["text_segments"][:, 1:].astype("float32")
    return {"text": text, "code": (batch["codes"], batch["code_weights"])}
