"""Objectives: batch -> weighted sums. A task takes a model as a value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.runtime.metrics import CalibrationError, Mean, Perplexity

Array = jax.Array
Batch = Mapping[str, Array]
Params = Any


@dataclasses.dataclass
class TokenPredictionConfig:
    """Predict batch['targets'] token by token: translation, language modelling."""

    label_smoothing: float = 0.1  # Szegedy et al. 2016; in training only
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


class TokenPrediction:
    """Cross-entropy of targets, normalised by the weights of real tokens."""

    metrics = ("loss", "accuracy", "perplexity", "ece")  # that evaluation reports

    def __init__(self, config: TokenPredictionConfig, model: nn.Module):
        self.config = config
        self.model = model

    def init(self, rng: Array, batch: Batch) -> Params:
        """Fresh float32 parameters."""
        return self.model.init(rng, batch)["params"]

    def loss(
        self, params: Params, batch: Batch, rng: Array | None, train: bool
    ) -> tuple[Mean, dict[str, Mean]]:
        """Loss in nats a token, and metrics, all as (total, weight).

        Training adds label smoothing, z-loss and dropout; evaluation adds the expected
        calibration error. `loss` is what is minimised; `perplexity` is without the
        additions.
        """
        rngs = {"dropout": rng} if train else {}
        logits = self.model.apply({"params": params}, batch, rngs=rngs)
        targets, weights = batch["targets"], batch["weights"].astype(jnp.float32)
        peak = jax.lax.stop_gradient(logits.max(-1))
        log_z = peak + jnp.log(jnp.exp(logits - peak[..., None]).sum(-1))
        # A masked sum instead of a gather: its gradient fuses, a gather's scatters.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        chosen = jnp.where(hit, logits, 0.0).sum(-1)
        nll = log_z - chosen
        # A tie with the target counts as right: ties have measure zero.
        correct = (chosen >= peak).astype(jnp.float32)
        metrics = {
            "accuracy": Mean.of(correct, weights),
            "perplexity": Perplexity.of(nll, weights),
        }
        loss = nll
        if train:
            smoothing = self.config.label_smoothing
            if smoothing:
                uniform = log_z - logits.mean(-1)
                loss = (1 - smoothing) * nll + smoothing * uniform
            if self.config.z_loss:
                loss += self.config.z_loss * log_z**2
        else:
            confidence = jnp.exp(peak - log_z)
            metrics["ece"] = CalibrationError.of(confidence, correct, weights)
        metrics["loss"] = Mean.of(loss, weights)
        return metrics["loss"], metrics


# config type: task
TASKS = {TokenPredictionConfig: TokenPrediction}


def build(config: Any, model: nn.Module) -> Any:
    """The task of a task config, over `model`."""
    return TASKS[type(config)](config, model)
