"""Texts and pictures in one space: which of several pictures fits a text best.

    python train.py --config=configs/contrastive.py --workdir=runs/contrastive_digits
    python generate.py --workdir=runs/dalle_digits --input="a handwritten seven" \
        --num_samples=64 --rerank=runs/contrastive_digits --output=grid.png

Measured on 2 shared cores of an AMD EPYC, niced: `digits`, 1,000 steps in 1 min 42 s of
CPU time (4 min 59 s from start to end). Of drawn digits, 98.25 % show the requested
digit; if this model selects the best of 8, 99.33 % do (docs/dalle.md). For 15 % of the
captions, the caption's own picture ranks first among up to 64, of which about six show
the same digit. `mnist`, `emoji` and `own` were not run.
"""

import functools

from triform.configs.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    TransformerConfig,
    smoke,
    vary,
)
from triform.data.datasets import CaptionedImagesConfig
from triform.models import ContrastiveConfig
from triform.tasks import MatchingConfig

VARIANTS = {
    "digits": {},
    "mnist": {
        "model.patch_size": 7,
        "data": {
            "source": "captioned_mnist",
            "train_split": "train[:55000]",
            "eval_split": "train[55000:]",
            "size": 28,
        },
        "steps": 3000,
    },
    "emoji": {
        "model": {"vocab_size": 1500, "patch_size": 4},
        "data": {"source": "noto_emoji", "size": 32, "channels": 3},
        "steps": 3000,
    },
    # A folder of pictures with metadata.csv: --config.data.source=FOLDER.
    "own": {
        "model": {"vocab_size": 4000, "patch_size": 8},
        "data": {"source": "pictures/", "size": 64, "channels": 3, "max_len": 32},
        "steps": 10_000,
    },
    "smoke": functools.partial(smoke, split="validation"),
}


def get_config(variant: str = "digits") -> ExperimentConfig:
    """Variants: 'digits', 'mnist', 'emoji', 'own', 'smoke'."""
    trunk = TransformerConfig(
        num_layers=3,
        d_model=96,
        num_heads=4,
        d_ff=384,
        max_len=0,
        positions="learned",
        norm_position="pre",
        ffn="gelu",
        init="normal",
        dropout=0.1,
    )
    model = ContrastiveConfig(
        trunk, vocab_size=320, image_size=0, patch_size=2, channels=0, width=64
    )
    model.image = type(trunk)(**vars(trunk))
    config = ExperimentConfig(
        model=model,
        task=MatchingConfig(),
        data=CaptionedImagesConfig(
            source="digits", size=8, channels=1, max_len=16, batch_size=64
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=100,
            b2=0.99,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        evaluation=EvaluationConfig(every=250, metrics=()),
        checkpoint=CheckpointConfig(every=250),
        steps=1000,
    )
    return vary(config, VARIANTS, variant)
