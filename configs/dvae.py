"""Discrete VAE: pictures to grids of codes and back, stage 1 of DALL-E.

    python train.py --config=configs/dvae.py --workdir=runs/dvae_digits

Evaluations write samples/*.png: pictures of the split above their reconstructions. For
the divergence's factor of 6.6, see tasks/image_coding.py and docs/dalle.md.

Measured on one core of an AMD EPYC with AVX-512, in a shared virtual machine. `digits`,
2,500 steps: 3 min 35 s from start to end, 3 min 20 s of CPU time together with stage 2;
squared error 0.0061 per test pixel in [0, 1]; 64 of 64 codes in use on validation,
perplexity 53. `mnist`, 1,500 steps (2 min 13 s of CPU time for the last 900): squared
error 0.0079; 128 of 128 codes, perplexity 85. `emoji`, 1,500 steps, on 2 cores beside
some 20 other processes: 5 min 45 s of CPU time; squared error 0.0134 (the mean picture:
0.076); 240 of 256 codes, perplexity 138. `own` is for an accelerator and was dry-run
only (docs/dalle.md).
"""

import functools

from triform.configs.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    ImagesConfig,
    OptimConfig,
    smoke,
    vary,
)
from triform.models import DiscreteVAEConfig
from triform.tasks import ImageCodingConfig


def lasting(steps: int) -> dict:
    """Steps of a run; over three quarters of them the temperature falls.

    The divergence's weight rises over the first 5,000 of 3,000,000 updates, as in the
    paper: over 4 of 2,500. Without it in the beginning few codes are ever used.
    """
    schedule = {"kl_steps": steps // 600, "temperature_steps": steps * 3 // 4}
    return {"steps": steps, "task": schedule, "evaluation.every": steps // 5}


VARIANTS = {
    # 8 x 8 pixels, 4 x 4 codes.
    "digits": lasting(2500),
    # 28 x 28 pixels, 7 x 7 codes.
    "mnist": {
        **lasting(1500),
        "model": {"num_codes": 128, "width": 16, "stages": 2, "blocks": 1},
        "data": {
            "source": "captioned_mnist",
            "train_split": "train[:55000]",
            "eval_split": "train[55000:]",
            "size": 28,
        },
    },
    # 32 x 32 pixels in colour, 8 x 8 codes.
    "emoji": {
        **lasting(1500),
        "model": {"num_codes": 256, "width": 32, "stages": 2, "blocks": 1},
        "data": {
            "source": "noto_emoji",
            "size": 32,
            "channels": 3,
            "batch_size": 32,
            "flip": True,
        },
    },
    # A folder of pictures: --config.data.source=FOLDER.
    "own": {
        **lasting(20_000),
        "model": {"num_codes": 1024, "width": 64, "stages": 3, "blocks": 2},
        "data": {"source": "pictures/", "size": 64, "channels": 3, "flip": True},
    },
    "smoke": (
        {"model": {"num_codes": 16, "width": 4, "blocks": 1}},
        functools.partial(smoke, split="validation"),
        lasting(5),
    ),
}


def get_config(variant: str = "digits") -> ExperimentConfig:
    """Variants: 'digits', 'mnist', 'emoji', 'own', 'smoke'."""
    config = ExperimentConfig(
        model=DiscreteVAEConfig(num_codes=64, width=32, stages=1, blocks=2),
        task=ImageCodingConfig(reconstruction="squared"),
        data=ImagesConfig(
            source="digits",
            label="",
            size=8,
            channels=1,
            # The model moves pixels of [0, 1] itself.
            mean=(0.0,),
            std=(1.0,),
            batch_size=64,
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=100,
            b2=0.999,
            eps=1e-8,
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        evaluation=EvaluationConfig(metrics=(), samples=16),
        checkpoint=CheckpointConfig(every=500, metric="eval/squared_error"),
    )
    return vary(config, VARIANTS, variant)
