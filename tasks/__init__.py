"""Objectives: batch -> weighted sums. A task takes a model as a value.

Every loss and metric is a sum and a weight: summed over micro-batches, devices and
hosts, and divided once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.runtime.metrics import CalibrationError, Correlation, Mean, Perplexity

Array = jax.Array
Batch = Mapping[str, Array]
Params = Any
Measured = tuple[Mean, dict[str, Mean]]


@dataclasses.dataclass
class PredictionConfig:
    """What all predictions of one among several classes share."""

    label_smoothing: float = 0.0  # Szegedy et al. 2016; in training only
    z_loss: float = 0.0  # weight of log(Z)^2, keeps logits near 0 (PaLM, 5: 1e-4)

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
    """Predict batch['targets'] token by token: translation, language modelling."""

    label_smoothing: float = 0.1


@dataclasses.dataclass
class ClassificationConfig(PredictionConfig):
    """Predict batch['label'], a class of the whole row."""


@dataclasses.dataclass
class PretrainingConfig(PredictionConfig):
    """BERT's two: masked tokens, and whether sentence B follows sentence A."""


@dataclasses.dataclass
class RegressionConfig:
    """Predict batch['label'], a number for the whole row, by least squares."""

    def validate(self) -> None:
        """Nothing can be wrong."""


@dataclasses.dataclass
class CrossEntropy:
    """Terms of one prediction, each of the shape of its targets, float32."""

    nll: Array  # nats
    loss: Array  # what is minimised: nll and, in training, the config's additions
    correct: Array  # 1 where the likeliest class is the target
    confidence: Array  # probability of the likeliest class

    @classmethod
    def of(
        cls, logits: Array, targets: Array, config: PredictionConfig, train: bool
    ) -> "CrossEntropy":
        """Of logits [..., V] and targets, ids [...] or distributions [..., V]."""
        peak = jax.lax.stop_gradient(logits.max(-1))
        log_z = peak + jnp.log(jnp.exp(logits - peak[..., None]).sum(-1))
        if targets.ndim == logits.ndim:
            chosen = (targets * logits).sum(-1)
            likeliest = logits.argmax(-1) == targets.argmax(-1)
        else:
            # A masked sum instead of a gather: its gradient fuses, a gather's scatters.
            index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
            chosen = jnp.where(index == targets[..., None], logits, 0.0).sum(-1)
            # A tie with the target counts as right: ties have measure zero.
            likeliest = chosen >= peak
        nll = log_z - chosen
        loss = nll
        if train:
            smoothing = config.label_smoothing
            if smoothing:
                uniform = log_z - logits.mean(-1)
                loss = (1 - smoothing) * nll + smoothing * uniform
            if config.z_loss:
                loss += config.z_loss * log_z**2
        correct = likeliest.astype(jnp.float32)
        return cls(nll, loss, correct, jnp.exp(peak - log_z))


class Task:
    """Base: a model's parameters, and its logits of a batch."""

    metrics: tuple[str, ...] = ("loss",)  # that evaluation reports
    predicts: tuple[str, ...] = ()  # keys of batch and logits

    def __init__(self, config: Any, model: nn.Module):
        self.config = config
        self.model = model

    def init(self, rng: Array, batch: Batch) -> Params:
        """Fresh float32 parameters."""
        return self.model.init(rng, batch)["params"]

    def logits(
        self, params: Params, batch: Batch, rng: Array | None, train: bool
    ) -> Mapping[str, Array]:
        """The model's, with dropout when training."""
        rngs = {"dropout": rng} if train else {}
        return self.model.apply({"params": params}, batch, rngs=rngs)

    def loss(
        self, params: Params, batch: Batch, rng: Array | None, train: bool
    ) -> Measured:
        """(what is minimised, metrics by name), all as (total, weight)."""
        raise NotImplementedError


class TokenPrediction(Task):
    """Cross-entropy of targets, normalised by the weights of real tokens."""

    metrics = ("loss", "accuracy", "perplexity", "ece")
    predicts = ("targets",)

    def loss(
        self, params: Params, batch: Batch, rng: Array | None, train: bool
    ) -> Measured:
        """Loss in nats a token, and metrics, all as (total, weight).

        Training adds label smoothing, z-loss and dropout; evaluation adds the expected
        calibration error. `loss` is what is minimised; `perplexity` is without the
        additions.
        """
        logits = self.logits(params, batch, rng, train)["targets"]
        terms = CrossEntropy.of(logits, batch["targets"], self.config, train)
        weights = batch["weights"].astype(jnp.float32)
        metrics = {
            "accuracy": Mean.of(terms.correct, weights),
            "perplexity": Perplexity.of(terms.nll, weights),
        }
        if not train:
            metrics["ece"] = CalibrationError.of(
                terms.confidence, terms.correct, weights
            )
        metrics["loss"] = Mean.of(terms.loss, weights)
        return metrics["loss"], metrics


class Classification(Task):
    """Cross-entropy of labels, normalised by the number of real rows."""

    metrics = ("loss", "accuracy", "ece")
    predicts = ("label",)

    def loss(
        self, params: Params, batch: Batch, rng: Array | None, train: bool
    ) -> Measured:
        """Loss in nats a row, and metrics, all as (total, weight)."""
        logits = self.logits(params, batch, rng, train)["label"]
        terms = CrossEntropy.of(logits, batch["label"], self.config, train)
        weights = batch["label_weights"].astype(jnp.float32)
        metrics = {"accuracy": Mean.of(terms.correct, weights)}
        if not train:
            metrics["ece"] = CalibrationError.of(
                terms.confidence, terms.correct, weights
            )
        metrics["loss"] = Mean.of(terms.loss, weights)
        return metrics["loss"], metrics


class Pretraining(Task):
    """Devlin et al. 2019, 3.1: the sum of the two mean losses.

    Written as one weighted mean, so that it stays exact over micro-batches and devices:
    a row's second loss weighs as much as its masked tokens together. Where all rows
    have as many, that is the sum of the means.
    """

    metrics = (
        *("loss", "masked_loss", "masked_accuracy"),
        *("next_loss", "next_accuracy"),
    )
    predicts = ("targets", "label")

    def loss(
        self, params: Params, batch: Batch, rng: Array | None, train: bool
    ) -> Measured:
        """Loss in nats a masked token, and metrics, all as (total, weight)."""
        logits = self.logits(params, batch, rng, train)
        masked, follows = (
            CrossEntropy.of(logits[name], batch[name], self.config, train)
            for name in ("targets", "label")
        )
        weights = batch["weights"].astype(jnp.float32)
        rows = batch["label_weights"].astype(jnp.float32)
        metrics = {
            "masked_loss": Mean.of(masked.nll, weights),
            "masked_accuracy": Mean.of(masked.correct, weights),
            "next_loss": Mean.of(follows.nll, rows),
            "next_accuracy": Mean.of(follows.correct, rows),
        }
        loss = Mean.of(masked.loss + follows.loss[:, None], weights)
        return loss, metrics | {"loss": loss}


class Regression(Task):
    """Squared error of numbers, normalised by the number of real rows."""

    metrics = ("loss", "pearson")
    predicts = ("label",)

    def loss(
        self, params: Params, batch: Batch, rng: Array | None, train: bool
    ) -> Measured:
        """Mean squared error and Pearson's correlation, as (total, weight)."""
        found = self.logits(params, batch, rng, train)["label"][..., 0]
        weights = batch["label_weights"].astype(jnp.float32)
        loss = Mean.of((found - batch["label"]) ** 2, weights)
        correlation = Correlation.of(found, batch["label"], weights)
        return loss, {"loss": loss, "pearson": correlation}


# config type: task
TASKS = {
    TokenPredictionConfig: TokenPrediction,
    ClassificationConfig: Classification,
    PretrainingConfig: Pretraining,
    RegressionConfig: Regression,
}


def build(config: Any, model: nn.Module) -> Any:
    """The task of a task config, over `model`."""
    return TASKS[type(config)](config, model)
