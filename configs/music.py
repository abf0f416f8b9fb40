"""Music Transformer (Huang et al. 2018) on Bach's chorales, and on MIDI files.

    python train.py --config=configs/music.py --workdir=runs/music
    python generate.py --workdir=runs/music --input="" --num_samples=8 \
        --max_tokens=1024 --output=bach.mid
"""

import functools

from triform.configs.schema import (
    CheckpointConfig,
    DecodeConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    LanguageModelConfig,
    OptimConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    update,
    vary,
)
from triform.data.codecs.music import MidiEvents, VoiceTokens
from triform.data.datasets import (
    FramesConfig,
    MusicInpaintingConfig,
    MusicTokensConfig,
)
from triform.models import PianoRollConfig
from triform.tasks import FramePredictionConfig


def lasting(steps: int, evaluations: int = 10) -> dict:
    """Steps of a run, with so many evaluations."""
    every = steps // evaluations
    return {"steps": steps, "evaluation.every": every, "checkpoint.every": every}


def quarter(config: ExperimentConfig) -> None:
    """Piano rolls on quarter notes."""
    config.model = PianoRollConfig(config.model.trunk)
    config.task = FramePredictionConfig()
    # A silent frame, then the longest piece of the test set.
    config.data = FramesConfig(
        source="jsb_chorales_quarter",
        max_len=161,
        buckets=(65,),
        transpose=6,
        batch_size=8,
    )


def harmonise(config: ExperimentConfig) -> None:
    """A masked model of all voices."""
    trunk = config.model.trunk
    config.model = EncoderConfig(
        trunk, vocab_size=VoiceTokens.size, num_types=4, num_labels=0
    )
    config.data = MusicInpaintingConfig(
        source="jsb_chorales", max_len=128, transpose=3, batch_size=24
    )


VARIANTS = {
    "": {},
    "quarter": (
        quarter,
        lasting(3000, 15),
        {"model.trunk": {"d_model": 128, "d_ff": 512, "dropout": 0.2}},
    ),
    "absolute": {"model.trunk.positions": "learned"},
    "harmonise": (harmonise, lasting(1000, 5)),
    # A folder of .mid files: --config.data.source=FOLDER.
    "midi": (
        lasting(20_000),
        {
            "model.vocab_size": MidiEvents.size,
            "model.trunk": {
                "num_layers": 6,
                "d_model": 256,
                "num_heads": 8,
                "d_ff": 1024,
                "dropout": 0.1,
            },
            "data": {
                "source": "midi/",
                "codec": "events",
                "max_len": 1024,
                "eval_stride": 512,
                "transpose": 3,
            },
        },
    ),
    "smoke": (
        functools.partial(smoke, split="validation"),
        {"data.max_len": 64, "data.eval_stride": 32},
    ),
}


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (16ths), 'quarter', 'absolute', 'harmonise', 'midi', 'smoke'."""
    trunk = TransformerConfig(
        num_layers=2,
        d_model=96,
        num_heads=4,
        d_ff=384,
        max_len=0,
        positions="learned_relative_keys",
        norm_position="pre",
        ffn="gelu",
        dropout=0.1,
    )
    config = ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab_size=VoiceTokens.size),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=MusicTokensConfig(
            source="jsb_chorales",
            max_len=192,
            eval_stride=96,
            transpose=3,
            batch_size=16,
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
        decode=DecodeConfig(method="sample"),
        evaluation=EvaluationConfig(metrics=()),
        checkpoint=CheckpointConfig(metric="eval/loss"),
    )
    update(config, lasting(2000, 8))
    return vary(config, VARIANTS, variant)
