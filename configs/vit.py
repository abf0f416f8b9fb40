"""Vision Transformers (Dosovitskiy et al. 2021) in three sizes, on ImageNet.

    python train.py --config=configs/vit.py:b16 --workdir=DIR --dry_run

Shapes are the paper's; the recipe is that of Beyer et al. 2022, "Better plain ViT
baselines", in outline. Counted and dry-run only: 86,567,656 parameters (b16),
304,326,632 (l16), 632,045,800 (h14).
"""

from triform.configs.schema import ExperimentConfig
from triform.data.datasets import ImagesConfig
from triform.models import VisionConfig
from triform.models.config import TransformerConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import ClassificationConfig

# Layers, width, heads, feed-forward width, patch, image.
SHAPES = {
    "b16": (12, 768, 12, 3072, 16, 224),
    "l16": (24, 1024, 16, 4096, 16, 224),
    "h14": (32, 1280, 16, 5120, 14, 224),
    "smoke": (2, 16, 2, 32, 7, 28),
}


def get_config(variant: str = "b16") -> ExperimentConfig:
    """Variants: 'b16', 'l16', 'h14', 'smoke'."""
    if variant not in SHAPES:
        raise ValueError(
            f"variant {variant!r}: expected 'b16', 'l16', 'h14' or 'smoke'"
        )
    layers, width, heads, d_ff, patch, image = SHAPES[variant]
    trunk = TransformerConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        d_ff=d_ff,
        max_len=(image // patch) ** 2 + 1,
        positions="learned",
        norm_position="pre",
        norm_eps=1e-12,
        ffn="gelu",
        dropout=0.1,
        dtype="bfloat16",
        remat=layers > 12,
        scan_layers=layers > 12,
    )
    config = ExperimentConfig(
        model=VisionConfig(trunk, image_size=image, patch_size=patch),
        task=ClassificationConfig(label_smoothing=0.1),
        data=ImagesConfig(
            source="imagenet2012",
            test_split="validation",
            size=image,
            channels=3,
            batch_size=1024,
            crop="resized",
            flip=True,
            rand_augment=2,
            mixup=0.2,
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=10_000,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        evaluation=EvaluationConfig(every=5000, metrics=()),
        checkpoint=CheckpointConfig(every=1000, metric="eval/accuracy", mode="max"),
        steps=112_600,
    )
    if variant == "smoke":
        config.model.channels = config.data.channels = 1
        config.model.num_labels = 10
        config.data.source = "mnist"
        config.data.train_split = config.data.eval_split = "test[:100]"
        config.data.test_split, config.data.batch_size = "test[:100]", 32
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    return config
