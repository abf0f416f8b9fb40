"""T5 (Raffel et al. 2020) and T5 v1.1 in their sizes: span corruption on C4.

    python train.py --config=configs/t5.py:11b --workdir=DIR --dry_run

Counted and dry-run only: 60,506,624 parameters (small), 222,903,552 (base), 737,668,096
(large), 76,961,152 (v1_1_small).
"""

from triform.configs.schema import ExperimentConfig
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets import SpanCorruptionConfig
from triform.models import EncoderDecoderConfig
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import TokenPredictionConfig

# Layers a side, width, heads, head width, feed-forward width.
SHAPES = {
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16_384),
    "11b": (24, 1024, 128, 128, 65_536),
    "v1_1_small": (8, 512, 6, 64, 1024),
    "v1_1_base": (12, 768, 12, 64, 2048),
    "v1_1_large": (24, 1024, 16, 64, 2816),
    "v1_1_xl": (24, 2048, 32, 64, 5120),
    "v1_1_xxl": (24, 4096, 64, 64, 10_240),
    "smoke": (1, 16, 2, 8, 32),
}


def get_config(variant: str = "small") -> ExperimentConfig:
    """Variants: 'small', 'base', 'large', '3b', '11b', 'v1_1_small', 'v1_1_base',
    'v1_1_large', 'v1_1_xl', 'v1_1_xxl', 'smoke'.
    """
    if variant not in SHAPES:
        names = ", ".join(f"'{name}'" for name in SHAPES)
        raise ValueError(f"variant {variant!r}: expected {names}")
    layers, width, heads, head_width, d_ff = SHAPES[variant]
    gated = variant.startswith("v1_1")
    trunk = TransformerConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        head_dim=head_width,
        d_ff=d_ff,
        max_len=512,
        attention_scale=1.0,
        positions="relative",
        norm="rms",
        norm_position="pre",
        ffn="geglu" if gated else "relu",
        bias="none",
        init="t5",
        dropout=0.0 if gated else 0.1,
        dtype="bfloat16",
        remat=layers > 12,
        scan_layers=layers > 12,
    )
    config = ExperimentConfig(
        model=EncoderDecoderConfig(
            trunk,
            vocab_size=32_128,
            tie_head=not gated,
            embedding_scale="none" if gated else "head",
        ),
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
    if variant == "smoke":
        trunk.max_len = config.data.max_len = 32
        config.model.vocab_size = 600
        config.data.source, config.data.tokenizer.kind = "wikitext2", "bpe"
        config.data.train_split = config.data.eval_split = "validation[:2]"
        config.data.test_split, config.data.batch_size = "validation[:2]", 128
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    return config
