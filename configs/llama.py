"""LLaMA-like models: Llama 3.2 1B and Llama 3 8B (Grattafiori et al. 2024).

    python train.py --config=configs/llama.py:8b --workdir=DIR --dry_run

Shapes are the published ones, the text is C4. Counted and dry-run only: 1,235,814,400
and 8,030,261,248 parameters.
"""

from triform.configs.schema import ExperimentConfig
from triform.data.datasets import CausalLMConfig
from triform.models import LanguageModelConfig
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import TokenPredictionConfig

# Layers, width, heads, key/value heads, feed-forward width, vocabulary, tied head.
SHAPES = {
    "1b": (16, 2048, 32, 8, 8192, 128_256, True),
    "8b": (32, 4096, 32, 8, 14_336, 128_256, False),
    "smoke": (2, 16, 4, 2, 32, 400, False),
}


def get_config(variant: str = "1b") -> ExperimentConfig:
    """Variants: '1b', '8b', 'smoke'."""
    if variant not in SHAPES:
        raise ValueError(f"variant {variant!r}: expected '1b', '8b' or 'smoke'")
    layers, width, heads, kv_heads, d_ff, vocab, tied = SHAPES[variant]
    trunk = TransformerConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        d_ff=d_ff,
        max_len=8192,
        positions="rotary",
        rope_base=500_000.0,
        norm="rms",
        norm_position="pre",
        norm_eps=1e-5,
        ffn="swiglu",
        bias="none",
        init="depth",
        dropout=0.0,
        dtype="bfloat16",
        remat=True,
        scan_layers=True,
    )
    if variant == "1b":  # reaches further than it was first trained for
        trunk.rope_scaling = ("llama3", 32.0, 1.0, 4.0, 8192)
    config = ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab, tie_head=tied),
        task=TokenPredictionConfig(label_smoothing=0.0, z_loss=1e-4),
        data=CausalLMConfig(
            source="c4/en", max_len=8192, batch_size=512, documents="separate"
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=3e-4,
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
    config.data.test_split = "validation"
    if variant == "smoke":
        trunk.max_len = config.data.max_len = 32
        config.data.source = "wikitext2"
        config.data.train_split = config.data.eval_split = "validation[:2]"
        config.data.test_split, config.data.batch_size = "validation[:2]", 128
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    return config
