"""Music Transformer (Huang et al. 2018) on Bach's chorales, and on MIDI files.

    python train.py --config=configs/music.py --workdir=runs/music
    python generate.py --workdir=runs/music --input="" --num_samples=8 \
        --max_tokens=1024 --output=bach.mid
    python benchmarks/music.py write --workdir=runs/music

Measured on one shared core of an AMD EPYC with AVX-512. Times are CPU time, then (in
brackets) from start to end. All pieces are transposed in training.

'' and `absolute`: nats per token of the validation pieces (test pieces in brackets),
for soprano, alto, tenor, bass of every 16th.

    '', relative attention        .413 (.427) in 7 min 4 s (16 min 41 s)
    '' --config.steps=10000       .380 (.389) in 16 min 19 s (37 min 39 s)
    `absolute`, without           .441 (.460) in 5 min 29 s (18 min 56 s)
    a Markov chain of each voice  .936   benchmarks/music.py

Published: .417 without and .357 with relative attention, .335 with relative pitch and
time too (Huang et al. 2018, models of 5 layers, 256 and 512 wide; commonly quoted
figures, not checked in the paper). On the same file, token by token in rows of 2,048:
.508 with rotary positions and .489 with polar ones (Gopalakrishnan et al. 2025, from a
summary). Differences here: in rows of 192 tokens only the later 96 are scored, so a
token sees 96 to 192 before it; the end of a piece is a token; pieces are transposed;
the model has 3 layers, 128 wide, 0.7 million parameters.

`quarter`: 8.028 nats per frame of the test pieces (7.975 on the validation pieces) in 4
min 24 s (9 min 8 s). The nats are summed over 88 keys, the first frame of a piece is
not scored, all frames have equal weight, and the checkpoint was chosen on the
validation pieces. Published with the same protocol (music_test.py of locuslab/TCN):
8.10, a temporal convolutional network (Bai et al. 2018). Difference here: pieces are
transposed in training by up to 6 semitones. 2 layers, dropout 0.2 and 3,000 steps of 8
rows gave 8.157 (8.135).

`harmonise`: 1.151 (1.138) nats per hidden token in 22 min 57 s (29 min 7 s). For the
sopranos of 48 test pieces, alto, tenor and bass equal Bach's in 28.1, 25.2 and 18.7 %
of 16ths; a voice's commonest pitch does in 13.7, 11.8 and 12.5 %. With 3,000 steps:
1.491.

`midi` was not run.
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
        batch_size=4,
    )


def harmonise(config: ExperimentConfig) -> None:
    """A masked model of all voices."""
    trunk = config.model.trunk
    config.model = EncoderConfig(
        trunk, vocab_size=VoiceTokens.size, num_types=4, num_labels=0
    )
    config.data = MusicInpaintingConfig(
        source="jsb_chorales", max_len=128, transpose=3, batch_size=12
    )


VARIANTS = {
    "": {},
    "quarter": (quarter, lasting(7000, 14), {"model.trunk.dropout": 0.25}),
    "absolute": {"model.trunk.positions": "learned"},
    "harmonise": (harmonise, lasting(12_000, 6)),
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
        num_layers=3,
        d_model=128,
        num_heads=4,
        d_ff=512,
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
            batch_size=8,
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
    update(config, lasting(4000, 8))
    return vary(config, VARIANTS, variant)
