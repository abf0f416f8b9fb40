"""Vision Transformers (Dosovitskiy et al. 2021) in three sizes, on ImageNet.

    python train.py --config=configs/vit.py:b16 --workdir=DIR --dry_run

Shapes are the paper's; the recipe roughly follows Beyer et al. 2022, "Better plain ViT
baselines". Counted and dry-run only: 86,567,656 parameters (b16), 304,326,632 (l16),
632,045,800 (h14).
"""

from typing import Any

from triform.configs.schema import (
    CheckpointConfig,
    ClassificationConfig,
    EvaluationConfig,
    ExperimentConfig,
    ImagesConfig,
    OptimConfig,
    TransformerConfig,
    VisionConfig,
    smoke,
    vary,
)


def size(layers: int, width: int, heads: int, d_ff: int, patch: int) -> dict[str, Any]:
    """A variant; those of more than 12 layers are scanned and recomputed."""
    deep = layers > 12
    shape = {"num_layers": layers, "d_model": width, "num_heads": heads, "d_ff": d_ff}
    return {
        "model.trunk": {**shape, "remat": deep, "scan_layers": deep},
        "model.patch_size": patch,
    }


VARIANTS = {
    "b16": size(12, 768, 12, 3072, 16),
    "l16": size(24, 1024, 16, 4096, 16),
    "h14": size(32, 1280, 16, 5120, 14),
    "smoke": (
        {
            "model": {"patch_size": 7, "num_labels": 10},
            "data": {
                "source": "mnist",
                "eval_split": "test",
                "size": 28,
                "channels": 1,
            },
        },
        smoke,
    ),
}


def get_config(variant: str = "b16") -> ExperimentConfig:
    """Variants: 'b16', 'l16', 'h14', 'smoke'."""
    trunk = TransformerConfig(
        positions="learned",
        norm_position="pre",
        norm_eps=1e-12,
        ffn="gelu",
        dropout=0.1,
        dtype="bfloat16",
        max_len=0,
    )
    config = ExperimentConfig(
        model=VisionConfig(trunk, image_size=0, channels=0, num_labels=1000),
        task=ClassificationConfig(label_smoothing=0.1),
        data=ImagesConfig(
            source="imagenet2012",
            test_split="validation",
            size=224,
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
    return vary(config, VARIANTS, variant)
