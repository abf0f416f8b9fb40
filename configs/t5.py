"""T5 (Raffel et al. 2020) and T5 v1.1 in their sizes: span corruption on C4.

    python train.py --config=configs/t5.py:11b --workdir=DIR --dry_run

Counted and dry-run only: 60,506,624 parameters (small), 222,903,552 (base), 737,668,096
(large), 76,961,152 (v1_1_small).
"""

import functools
from typing import Any

from triform.configs.schema import (
    CheckpointConfig,
    DecodeConfig,
    EncoderDecoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    SpanCorruptionConfig,
    TokenizerConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)


def size(
    layers: int, width: int, heads: int, head_width: int, d_ff: int
) -> dict[str, Any]:
    """A variant of so many layers in each stack; more than 12 are recomputed."""
    return {
        "model.trunk": {
            "num_layers": layers,
            "d_model": width,
            "num_heads": heads,
            "head_dim": head_width,
            "d_ff": d_ff,
            "remat": layers > 12,
            "scan_layers": layers > 12,
        }
    }


V1_1 = {
    "model.trunk": {"ffn": "geglu", "dropout": 0.0},
    "model": {"tie_head": False, "embedding_scale": "none"},
}
VARIANTS = {
    "small": size(6, 512, 8, 64, 2048),
    "base": size(12, 768, 12, 64, 3072),
    "large": size(24, 1024, 16, 64, 4096),
    "3b": size(24, 1024, 32, 128, 16_384),
    "11b": size(24, 1024, 128, 128, 65_536),
    "v1_1_small": (V1_1, size(8, 512, 6, 64, 1024)),
    "v1_1_base": (V1_1, size(12, 768, 12, 64, 2048)),
    "v1_1_large": (V1_1, size(24, 1024, 16, 64, 2816)),
    "v1_1_xl": (V1_1, size(24, 2048, 32, 64, 5120)),
    "v1_1_xxl": (V1_1, size(24, 4096, 64, 64, 10_240)),
    "smoke": (
        {"data.source": "wikitext2", "data.tokenizer.kind": "bpe"},
        functools.partial(smoke, split="validation[:2]"),
    ),
}


def get_config(variant: str = "small") -> ExperimentConfig:
    """Variants: 'small', 'base', 'large', '3b', '11b', 'v1_1_small', 'v1_1_base',
    'v1_1_large', 'v1_1_xl', 'v1_1_xxl', 'smoke'.
    """
    trunk = TransformerConfig(
        max_len=0,
        attention_options=("scale", 1.0),
        positions="relative",
        norm="rms",
        norm_position="pre",
        ffn="relu",
        bias="none",
        init="t5",
        dropout=0.1,
        dtype="bfloat16",
    )
    config = ExperimentConfig(
        model=EncoderDecoderConfig(trunk, vocab_size=32_128, embedding_scale="head"),
        task=TokenPredictionConfig(label_smoothing=0.0, z_loss=1e-4),
        data=SpanCorruptionConfig(
            source="c4/en",
            test_split="validation",
            max_len=512,
            batch_size=128,
            tokenizer=TokenizerConfig(kind="unigram"),
        ),
        optim=OptimConfig(
            name="adafactor", learning_rate=1e-2, schedule="rsqrt", warmup_steps=10_000
        ),
        decode=DecodeConfig(method="greedy"),
        evaluation=EvaluationConfig(every=5000, metrics=()),
        checkpoint=CheckpointConfig(every=1000),
        steps=524_288,
    )
    return vary(config, VARIANTS, variant)
