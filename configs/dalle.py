"""DALL-E (Ramesh et al. 2021): pictures from words, stage 2.

    python train.py --config=configs/dvae.py --workdir=runs/dvae_digits
    python train.py --config=configs/dalle.py --workdir=runs/dalle_digits \
        --config.data.codes=runs/dvae_digits

Measured on one core of an AMD EPYC with AVX-512, in a shared virtual machine. A ViT
that has seen no drawn picture judges the digits: benchmarks/dalle.py, docs/dalle.md.

`digits`, 1,200 steps: 6 min 27 s from start to end together with stage 1, 3 min 20 s of
CPU time. Of 1,200 pictures drawn from captions with a guidance of 2, 97.67 % show the
requested digit; the ViT has 97.0 % accuracy on 100 test pictures.

`mnist`, 2,000 steps: 8 min 27 s from start to end, 5 min 32 s of CPU time; 2.009 nats
per code of the test pictures. Of 1,200 drawn pictures, 98.58 % show the requested
digit; the ViT has 98.90 % accuracy on the test images.

`emoji`, 900 steps, on 2 cores beside some 20 other processes: 2 min 57 s of CPU time,
3.330 nats per code of the test pictures. Without captions: 3.340; trained without
captions: 3.339; by the codes' frequencies: 5.004. Captions save 0.010 +- 0.010
(standard error over figures), for figures without skin tone 0.038 +- 0.007. Among 138
test pictures, the named one has a median rank of 34.

`12b` (12,292,808,448 parameters) and `own` were counted and dry-run only.
"""

import functools

from triform.configs.schema import (
    CheckpointConfig,
    DecodeConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    TransformerConfig,
    smoke,
    vary,
)
from triform.data.datasets import ImageCodesConfig
from triform.models import TextToImageConfig
from triform.tasks import TextToImagePredictionConfig


def lasting(steps: int) -> dict:
    """Steps of a run, with five evaluations."""
    return {"steps": steps, "evaluation.every": steps // 5}


# Three layers out of four see rows, as Child et al. 2019 have it; the last one of all
# sees a square around each code (Ramesh et al. 2021, B.1).
SPARSE = ("row", "column", "row", "row")
VARIANTS = {
    "digits": lasting(1200),
    "mnist": {
        **lasting(2000),
        "data": {
            "source": "captioned_mnist",
            "train_split": "train[:55000]",
            "eval_split": "train[55000:]",
            "codes": "runs/dvae_mnist",
            "grid": 7,
        },
    },
    "emoji": {
        **lasting(900),
        "model.trunk": {
            "num_layers": 4,
            "d_model": 128,
            "d_ff": 512,
            "dropout": 0.2,
            "patterns": ("row", "column", "row", "conv:3"),
        },
        "model.vocab_size": 1200,
        "data": {
            "source": "noto_emoji",
            "codes": "runs/dvae_emoji",
            "grid": 8,
            "batch_size": 32,
            "token_dropout": 0.3,
            "flip": True,
        },
    },
    # A folder of pictures with metadata.csv: --config.data.source=FOLDER.
    "own": {
        **lasting(20_000),
        "model.trunk": {"d_model": 256, "num_heads": 8, "d_ff": 1024, "num_layers": 6},
        "model.vocab_size": 4000,
        "data": {
            "source": "pictures/",
            "codes": "runs/dvae_own",
            "grid": 8,
            "max_len": 32,
        },
    },
    "12b": {
        **lasting(430_000),
        "model": {"vocab_size": 16_384, "num_codes": 8192},
        "model.trunk": {
            "num_layers": 64,
            "d_model": 3968,
            "num_heads": 62,
            "head_dim": 64,
            "d_ff": 4 * 3968,
            "dropout": 0.1,
            "attention": "flash",
            "patterns": (SPARSE * 16)[:-1] + ("conv:11",),
            "dtype": "bfloat16",
            "remat": True,
        },
        "data": {
            "source": "coco_captions",
            "test_split": "validation",
            "codes": "runs/dvae",
            "grid": 32,
            "max_len": 256,
            "batch_size": 1024,
        },
        "optim": {
            "learning_rate": 4.5e-4,
            "warmup_steps": 5000,
            "b2": 0.96,
            "weight_decay": 4.5e-2,
            "clip_norm": 4.0,
        },
    },
    "smoke": (
        {"data.grid": 4, "model.trunk.patterns": ("row", "conv:3")},
        functools.partial(smoke, split="validation"),
    ),
}


def get_config(variant: str = "digits") -> ExperimentConfig:
    """Variants: 'digits', 'mnist', 'emoji', 'own', '12b', 'smoke'."""
    trunk = TransformerConfig(
        num_layers=3,
        d_model=96,
        num_heads=4,
        d_ff=384,
        max_len=0,
        positions="none",
        norm_position="pre",
        ffn="gelu",
        init="depth",
        dropout=0.1,
        patterns=("row", "column", "conv:3"),
    )
    config = ExperimentConfig(
        model=TextToImageConfig(trunk, vocab_size=320, num_codes=-1),
        task=TextToImagePredictionConfig(),
        data=ImageCodesConfig(
            source="digits",
            codes="runs/dvae_digits",
            grid=4,
            max_len=16,
            batch_size=64,
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=100,
            b2=0.99,
            eps=1e-8,
            weight_decay=0.05,
            clip_norm=1.0,
        ),
        decode=DecodeConfig(method="sample", guidance=2.0),
        evaluation=EvaluationConfig(metrics=()),
        checkpoint=CheckpointConfig(every=500, metric="eval/code_loss"),
    )
    return vary(config, VARIANTS, variant)
