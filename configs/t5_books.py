"""T5 pre-trained on public-domain books: span corruption.

    python train.py --config=configs/t5_books.py:cpu --workdir=DIR

Next: configs/t5_multitask.py. The tokenizer is also trained on its corpora.

Measured on 2 cores of an AMD EPYC beside other jobs, after 2,000 steps: 4.36 nats per
token and 32.7 % of the tokens correct on the validation split. Adam at 2e-3 with an
rsqrt schedule reached 4.66 and 32.0 %.
"""

import functools

from triform.configs.schema import (
    CheckpointConfig,
    DecodeConfig,
    EncoderDecoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    SpanCorruptionConfig,
    TokenizerConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)

VARIANTS = {
    "cpu": {},
    "smoke": (
        {"data.tokenizer.corpora": ()},
        functools.partial(smoke, split="validation[:1]"),
    ),
}


def get_config(variant: str = "cpu") -> ExperimentConfig:
    """Variants: 'cpu' (for 2 cores), 'smoke'."""
    trunk = TransformerConfig(
        num_layers=3,
        d_model=192,
        num_heads=6,
        d_ff=512,
        max_len=0,
        attention_options=("scale", 1.0),
        positions="relative",
        norm="rms",
        norm_position="pre",
        ffn="geglu",
        bias="none",
        init="t5",
        dropout=0.0,
    )
    corpora = (
        "multi30k_translate:en",
        "multi30k_translate:de",
        "clinc150:text",
        "mr_sentiment:text",
    )
    config = ExperimentConfig(
        model=EncoderDecoderConfig(trunk, vocab_size=8000, embedding_scale="head"),
        task=TokenPredictionConfig(label_smoothing=0.0, z_loss=1e-4),
        data=SpanCorruptionConfig(
            source="classic_books",
            test_split="validation",
            max_len=64,
            batch_size=64,
            tokenizer=TokenizerConfig(corpora=corpora),
        ),
        # Raffel et al. 2020, 3.1.2: Adafactor at 0.01.
        optim=OptimConfig(
            name="adafactor",
            learning_rate=0.01,
            schedule="linear",
            warmup_steps=100,
            clip_norm=1.0,
        ),
        decode=DecodeConfig(method="greedy"),
        evaluation=EvaluationConfig(every=1000, metrics=()),
        checkpoint=CheckpointConfig(every=250),
        steps=2000,
    )
    return vary(config, VARIANTS, variant)
