"""A paper's code in one file: a source, a task, an activation and their config.

triform train --config=sums.py --workdir=runs/sums
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from triform.configs import schema
from triform.data.sources import Embedded
from triform.tasks import TokenPrediction


class Sums:
    """Sums of small numbers, written in digits."""

    SPLITS = ("train", "validation", "test")

    def version() -> str:
        return "1"

    def examples(split: str) -> list[dict[str, str]]:
        first = 30 * Sums.SPLITS.index(split)
        return [{"text": f"{a}+{a}={a + a}"} for a in range(first, first + 30)]


@dataclasses.dataclass
class CalmConfig(schema.TokenPredictionConfig):
    penalty: float = 0.1  # factor on the negative entropy of predictions


class Calm(TokenPrediction):
    """Cross-entropy, and a penalty on confident outputs (Pereyra et al. 2017)."""

    def weights(self, batch):
        return super().weights(batch) | {"entropy": batch["weights"].sum()}

    def terms(self, outputs, batch, ctx):
        p = jax.nn.log_softmax(outputs["targets"])
        entropy = ((jnp.exp(p) * p).sum(-1) * batch["weights"]).sum()
        return super().terms(outputs, batch, ctx) | {"entropy": entropy}

    def coefficients(self, step):
        return {"entropy": self.config.penalty}


SOURCES = {"sums": functools.partial(Embedded, Sums)}
TASKS = {CalmConfig: Calm}
FFNS = {"relu2": (lambda x: jnp.maximum(x, 0) ** 2, False)}


def get_config(variant: str = "") -> schema.ExperimentConfig:
    data = schema.CausalLMConfig(source="sums", max_len=32, batch_size=4)
    model = schema.LanguageModelConfig(vocab_size=259)
    config = schema.ExperimentConfig(model, CalmConfig(label_smoothing=0.0), data)
    data.tokenizer.kind, config.decode.method = "bytes", "greedy"
    config.evaluation.metrics, model.trunk.ffn = (), "relu2"
    schema.smoke(config, "validation")
    return config
