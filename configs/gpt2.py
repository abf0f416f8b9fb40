"""GPT-2 (Radford et al. 2019) in its four sizes.

    python train.py --config=configs/gpt2.py:small --workdir=DIR --dry_run

Shapes and initialisation are the paper's; the text is C4 instead of WebText. Counted
and dry-run only: 124,439,808, 354,823,168, 774,030,080 and 1,557,611,200 parameters.
"""

import functools
from typing import Any

from triform.configs.schema import (
    CausalLMConfig,
    CheckpointConfig,
    DecodeConfig,
    EvaluationConfig,
    ExperimentConfig,
    LanguageModelConfig,
    OptimConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)


def size(layers: int, width: int, heads: int) -> dict[str, Any]:
    """A variant; those of more than 12 layers are scanned and recomputed."""
    deep = layers > 12
    shape = {"num_layers": layers, "d_model": width, "num_heads": heads}
    return {
        "model.trunk": {**shape, "d_ff": 4 * width, "remat": deep, "scan_layers": deep}
    }


VARIANTS = {
    "small": size(12, 768, 12),
    "medium": size(24, 1024, 16),
    "large": size(36, 1280, 20),
    "xl": size(48, 1600, 25),
    "smoke": (
        {"data.source": "wikitext2", "data.documents": "separate"},
        functools.partial(smoke, split="validation[:2]"),
    ),
}


def get_config(variant: str = "small") -> ExperimentConfig:
    """Variants: 'small', 'medium', 'large', 'xl', 'smoke'."""
    trunk = TransformerConfig(
        max_len=0,
        positions="learned",
        norm_position="pre",
        norm_eps=1e-5,
        ffn="gelu_tanh",
        init="depth",
        dropout=0.1,
        attention_dropout=0.1,
        dtype="bfloat16",
    )
    config = ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab_size=50_257),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=CausalLMConfig(
            source="c4/en", test_split="validation", max_len=1024, batch_size=512
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=6e-4,
            schedule="cosine",
            warmup_steps=2000,
            floor=0.1,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        decode=DecodeConfig(method="sample", top_p=0.9),
        evaluation=EvaluationConfig(every=5000, metrics=()),
        checkpoint=CheckpointConfig(every=1000),
        steps=100_000,
    )
    return vary(config, VARIANTS, variant)
