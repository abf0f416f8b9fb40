"""The training that tests/kill_harness.py kills: all that a resumed run must restore.

Dropout, shuffling, accumulation, a moving average, asynchronous saves, evaluation, and
a corpus that is tokenised in many parts by other processes. Its metric `rows` is a hash
of the rows that a step was given, computed inside the step, so that metrics.jsonl tells
what was trained on.
"""

import dataclasses

import jax.numpy as jnp

from triform.configs import schema
from triform.data import encoding
from triform.runtime.metrics import Mean
from triform.tasks import TokenPrediction

encoding.PART, encoding.WORKERS = 20_000, 1


@dataclasses.dataclass
class HashedConfig(schema.TokenPredictionConfig):
    """Token prediction that measures which rows it was given."""


class Hashed(TokenPrediction):
    """TokenPrediction with the metric `rows`."""

    def metrics(self, outputs, batch, ctx):
        tokens = batch["targets"].astype(jnp.uint32)
        at = jnp.arange(tokens.shape[1], dtype=jnp.uint32)
        mixed = (tokens + jnp.uint32(1)) * (at * jnp.uint32(40503) + jnp.uint32(77))
        rows = mixed.sum(-1, dtype=jnp.uint32) + ctx.step.astype(jnp.uint32)
        rows = (rows * jnp.uint32(2654435761)) >> 18
        # Below 2**14: sums over rows are exact in float32 in every order.
        rows = rows.astype(jnp.float32) * (batch["weights"].sum(-1) > 0)
        found = super().metrics(outputs, batch, ctx)
        return found | {"rows": Mean(rows.sum(), jnp.float32(1))}


TASKS = {HashedConfig: Hashed}


def get_config() -> schema.ExperimentConfig:
    """data.source is set on the command line."""
    trunk = schema.TransformerConfig(
        num_layers=1,
        d_model=16,
        num_heads=2,
        d_ff=32,
        max_len=0,
        norm_position="pre",
        dropout=0.1,
        attention_dropout=0.1,
    )
    return schema.ExperimentConfig(
        model=schema.LanguageModelConfig(trunk, vocab_size=259),
        task=HashedConfig(label_smoothing=0.0),
        data=schema.CausalLMConfig(
            source="the harness names it",
            eval_split="test",
            test_split="test",
            max_len=32,
            batch_size=8,
            held_out=0.1,
            tokenizer=schema.TokenizerConfig(kind="bytes"),
        ),
        optim=schema.OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=10,
            weight_decay=0.1,
            clip_norm=1.0,
            accumulate=2,
            ema_decay=0.9,
        ),
        evaluation=schema.EvaluationConfig(every=10, metrics=()),
        checkpoint=schema.CheckpointConfig(every=4, keep_newest=3),
        log_every=2,
    )
