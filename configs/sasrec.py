"""SASRec: which item comes next (Kang & McAuley 2018)."""

from triform.configs.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    TransformerConfig,
    smoke,
    vary,
)
from triform.data.datasets import InteractionsConfig, MaskedInteractionsConfig
from triform.models import RecommenderConfig
from triform.tasks import ItemPredictionConfig, SampledItemsConfig

EPOCH = 228  # steps: 30,711 users in 3,646 rows

VARIANTS = {
    "": {},
    "softmax": {"task": ItemPredictionConfig(), "data.negatives": 0},
    # Sun et al. 2019 and their code's settings for Amazon's reviews (beauty), but for
    # the learning rate, which is 1e-4 over 400,000 steps there.
    "bert4rec": {
        "model": {"causal": False, "scale": False, "output_layer": True},
        "model.trunk": {
            "d_model": 64,
            "num_heads": 2,
            "d_ff": 256,
            "norm_position": "post",
            "norm_eps": 1e-12,
            "ffn": "gelu",
            "init": "normal",
            "attention_dropout": 0.2,
        },
        "task": ItemPredictionConfig(),
        "data": MaskedInteractionsConfig(mask_rate=0.6),
        "optim": {
            "name": "adamw",
            "schedule": "linear",
            "warmup_steps": 100,
            "b2": 0.999,
            "eps": 1e-6,
            "weight_decay": 0.01,
            "clip_norm": 5.0,
        },
    },
    "smoke": smoke,
}


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (the paper), 'softmax', 'bert4rec', 'smoke'."""
    trunk = TransformerConfig(
        num_layers=2,
        d_model=50,
        num_heads=1,
        d_ff=50,
        max_len=0,
        positions="learned",
        norm_position="pre",
        norm_eps=1e-8,
        dropout=0.5,
        attention_dropout=0.5,
    )
    config = ExperimentConfig(
        model=RecommenderConfig(trunk),
        task=SampledItemsConfig(),
        data=InteractionsConfig(),
        optim=OptimConfig(
            name="adam",
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=0,
            b2=0.98,
            eps=1e-8,
        ),
        evaluation=EvaluationConfig(every=20 * EPOCH, metrics=()),
        checkpoint=CheckpointConfig(
            every=10 * EPOCH, metric="eval/sampled_ndcg_10", mode="max"
        ),
        steps=200 * EPOCH,
    )
    return vary(config, VARIANTS, variant)
