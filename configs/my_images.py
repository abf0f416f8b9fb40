"""A classifier of your own pictures (ViT).

    python train.py --config=configs/my_images.py --workdir=DIR \
        --config.data.source=FOLDER

FOLDER holds one folder of pictures per class, or pictures and a metadata.csv or .jsonl
with the columns file_name and label. Folders named train, validation and test are the
splits; 5 % are held out for each missing one. Pictures are resized to
--config.data.size (pixels per side). For one channel: --config.data.channels=1.

To start from another workdir, for example imported weights: --config.model=from:WEIGHTS
--config.init_from=WEIGHTS --config.data.size=224
"""

from triform.configs import schema

VARIANTS = {"": {}, "smoke": lambda config: schema.smoke(config, split="all")}


def get_config(variant: str = "") -> schema.ExperimentConfig:
    """Variants: '' (minutes on 2 cores), 'smoke'."""
    trunk = schema.TransformerConfig(num_layers=4, d_model=96, num_heads=4, d_ff=384)
    trunk.max_len, trunk.positions, trunk.norm_position = 0, "learned", "pre"
    trunk.init = "normal"
    config = schema.ExperimentConfig(
        model=schema.VisionConfig(
            trunk, image_size=0, patch_size=4, channels=0, num_labels=-1
        ),
        task=schema.ClassificationConfig(label_smoothing=0.1),
        data=schema.ImagesConfig(
            source="./my_images",
            size=32,
            channels=3,
            batch_size=64,
            crop="pad",
        ),
        optim=schema.OptimConfig(
            "adamw", 2e-3, "cosine", warmup_steps=200, clip_norm=1.0
        ),
        evaluation=schema.EvaluationConfig(every=500, metrics=()),
        checkpoint=schema.CheckpointConfig(500, metric="eval/accuracy", mode="max"),
        steps=2000,
    )
    return schema.vary(config, VARIANTS, variant)
