"""Cross-entropy of one among several classes: per token, or per row."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from triform.runtime.metrics import CalibrationError, Mean, Metrics, Perplexity
from triform.tasks.base import (
    Batch,
    Context,
    Outputs,
    Scalars,
    Task,
    candidates,
    likeliest,
    over,
    row_mean,
)

Array = jax.Array


@dataclasses.dataclass
class PredictionConfig:
    """Settings of every prediction of one among several classes."""

    label_smoothing: float = 0.0  # in training only (Szegedy et al. 2016); 0: off
    z_loss: float = 0.0  # weight of log(Z)^2 in the loss (PaLM, 5: 1e-4); 0: off

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"task.label_smoothing={self.label_smoothing}: must lie in [0, 1); "
                "0 switches it off"
            )
        if self.z_loss < 0:
            raise ValueError(
                f"task.z_loss={self.z_loss}: must not be negative; 0 switches it off"
            )


@dataclasses.dataclass
class TokenPredictionConfig(PredictionConfig):
    """Predict batch["targets"] per token: translation, language models, tags."""

    label_smoothing: float = 0.1


@dataclasses.dataclass
class ClassificationConfig(PredictionConfig):
    """Predict batch['label'], the class of a row."""


@struct.dataclass
class CrossEntropy:
    """Parts of one prediction, each of the shape of its targets, float32."""

    nll: Array  # nats
    loss: Array  # what is minimised: nll and, in training, the config's additions
    correct: Array  # 1 where the likeliest class is the target; ties share it
    confidence: Array  # probability of the likeliest class

    @classmethod
    def of(
        cls,
        logits: Any,
        targets: Array,
        config: PredictionConfig,
        train: bool,
    ) -> "CrossEntropy":
        """From logits [..., V] and targets: ids [...] or distributions [..., V].

        The logits may come in parts: see `over`.
        """
        smoothing, z_loss = config.label_smoothing, config.z_loss
        key = cls, smoothing if train else 0.0, z_loss if train else 0.0
        return over(logits, partial(cls._of, *key[1:]), targets, key=key)

    @classmethod
    def _of(
        cls, smoothing: float, z_loss: float, logits: Array, targets: Array
    ) -> "CrossEntropy":
        peak = jax.lax.stop_gradient(logits.max(-1))
        log_z = peak + jnp.log(jnp.exp(logits - peak[..., None]).sum(-1))
        ties = (logits == peak[..., None]).sum(-1)
        if targets.ndim == logits.ndim:
            chosen = (targets * logits).sum(-1)
            index = targets.argmax(-1)[..., None]
            right = jnp.take_along_axis(logits, index, -1)[..., 0] >= peak
        else:
            # A masked sum instead of a gather: its gradient fuses, a gather's scatters.
            index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
            chosen = jnp.where(index == targets[..., None], logits, 0.0).sum(-1)
            right = chosen >= peak
        nll = log_z - chosen
        loss = nll
        if smoothing:
            uniform = log_z - logits.mean(-1)
            loss = (1 - smoothing) * nll + smoothing * uniform
        if z_loss:
            loss += z_loss * log_z**2
        # A model whose logits are all equal is right for one class in V, not always.
        correct = right / ties.astype(jnp.float32)
        return cls(nll, loss, correct, jnp.exp(peak - log_z))


class Prediction(Task):
    """Cross-entropy of the field `target`, averaged over its weights.

    `loss` is what is minimised: in training with label smoothing and z-loss.
    """

    target: ClassVar[str]
    weight: ClassVar[str]
    term: ClassVar[str]

    def _parts(self, outputs: Outputs, batch: Batch, train: bool) -> CrossEntropy:
        logits, targets = outputs[self.target], batch[self.target]
        return CrossEntropy.of(logits, targets, self.config, train)

    def _weights(self, batch: Batch) -> Array:
        return batch[self.weight].astype(jnp.float32)

    def weights(self, batch: Batch) -> Scalars:
        """The sum of the weights of all targets."""
        return {self.term: self._weights(batch).sum()}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over the targets."""
        loss = self._parts(outputs, batch, ctx.train).loss
        return {self.term: (loss * self._weights(batch)).sum()}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Accuracy; in evaluation also the expected calibration error."""
        parts, weights = self._parts(outputs, batch, ctx.train), self._weights(batch)
        found = {"accuracy": Mean.of(parts.correct, weights)}
        if not ctx.train:
            found["ece"] = CalibrationError.of(parts.confidence, parts.correct, weights)
        return found


class TokenPrediction(Prediction):
    """Cross-entropy of targets [B, L], in nats per real token."""

    target, weight, term = "targets", "weights", "token"
    fields, needs = ("targets", "weights"), ("targets",)
    reports = ("loss", "accuracy", "perplexity", "ece")

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Also the perplexity, without smoothing and z-loss."""
        nll = self._parts(outputs, batch, ctx.train).nll
        perplexity = Perplexity.of(nll, self._weights(batch))
        return super().metrics(outputs, batch, ctx) | {"perplexity": perplexity}

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] in nats per token, targets [B, L] (likeliest ids), weights."""
        nll, weights = self._parts(outputs, batch, False).nll, self._weights(batch)
        best = over(outputs[self.target], likeliest)
        return {"loss": row_mean(nll, weights), "targets": best, "weights": weights}

    def answer(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """targets [B, L], and the likeliest candidates of each [B, L, n]."""
        logits = outputs[self.target]
        return {"targets": over(logits, likeliest), **over(logits, candidates)}


class Classification(Prediction):
    """Cross-entropy of label [B], in nats per real row."""

    target, weight, term = "label", "label_weights", "label"
    fields, needs = ("label", "label_weights"), ("label",)
    reports = ("loss", "accuracy", "ece")

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] in nats, label [B] (likeliest), probabilities [B, V]."""
        logits = outputs[self.target]
        return {
            "loss": self._parts(outputs, batch, False).nll,
            "label": likeliest(logits),
            "probabilities": jax.nn.softmax(logits, -1),
        }
