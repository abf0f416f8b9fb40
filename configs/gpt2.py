"""GPT-2 (Radford et al. 2019) in its four sizes.

    python train.py --config=configs/gpt2.py:small --workdir=DIR --dry_run

Shapes and initialisation are the paper's, the text is C4 in place of WebText. Counted
and dry-run only: 124,439,808, 354,823,168, 774,030,080 and 1,557,611,200 parameters.
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

# Layers, width, heads.
SHAPES = {
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
    "smoke": (2, 16, 2),
}


def get_config(variant: str = "small") -> ExperimentConfig:
    """Variants: 'small', 'medium', 'large', 'xl', 'smoke'."""
    if variant not in SHAPES:
        raise ValueError(
            f"variant {variant!r}: expected 'small', 'medium', 'large', 'xl' or 'smoke'"
        )
    layers, width, heads = SHAPES[variant]
    trunk = TransformerConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        d_ff=4 * width,
        max_len=1024,
        positions="learned",
        norm_position="pre",
        norm_eps=1e-5,
        ffn="gelu_tanh",
        init="depth",
        dropout=0.1,
        attention_dropout=0.1,
        dtype="bfloat16",
        remat=layers > 12,
        scan_layers=layers > 12,
    )
    config = ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab_size=50_257),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=CausalLMConfig(source="c4/en", max_len=1024, batch_size=512),
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
    config.data.test_split = "validation"
    if variant == "smoke":
        trunk.max_len = config.data.max_len = 32
        config.model.vocab_size = 400
        config.data.source = "wikitext2"
        config.data.train_split = config.data.eval_split = "validation[:2]"
        config.data.test_split, config.data.batch_size = "validation[:2]", 128
        config.data.documents = "separate"
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    return config
