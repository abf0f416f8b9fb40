"""T5 pre-trained on public-domain books: span corruption.

    python train.py --config=configs/t5_books.py:cpu --workdir=DIR

Next: configs/t5_multitask.py. The tokenizer is also trained on what comes there.

Measured on 2 cores of an AMD EPYC beside other jobs, after 2,000 steps: 4.36 nats a
token and 32.7 % of the tokens right on the validation split. Adam at 2e-3 with an rsqrt
schedule came to 4.66 and 32.0 %.
"""

from triform.configs.schema import ExperimentConfig
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets import SpanCorruptionConfig
from triform.models import EncoderDecoderConfig
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import TokenPredictionConfig


def get_config(variant: str = "cpu") -> ExperimentConfig:
    """Variants: 'cpu' (for 2 cores), 'smoke'."""
    trunk = TransformerConfig(
        num_layers=3,
        d_model=192,
        num_heads=6,
        d_ff=512,
        max_len=64,
        attention_scale=1.0,
        positions="relative",
        norm="rms",
        norm_position="pre",
        ffn="geglu",
        bias="none",
        init="t5",
        dropout=0.0,
    )
    config = ExperimentConfig(
        model=EncoderDecoderConfig(trunk, vocab_size=8000, embedding_scale="head"),
        task=TokenPredictionConfig(label_smoothing=0.0, z_loss=1e-4),
        data=SpanCorruptionConfig(
            source="classic_books",
            test_split="validation",
            max_len=64,
            batch_size=64,
            tokenizer=TokenizerConfig(
                corpora=(
                    *("multi30k_translate:en", "multi30k_translate:de"),
                    *("clinc150:text", "mr_sentiment:text"),
                )
            ),
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
    if variant == "smoke":
        trunk.num_layers, trunk.d_model, trunk.num_heads, trunk.d_ff = 1, 16, 2, 32
        trunk.max_len = config.data.max_len = 32
        config.model.vocab_size = 600
        config.data.train_split = config.data.eval_split = "validation[:1]"
        config.data.test_split = "validation[:1]"
        config.data.batch_size, config.data.tokenizer.corpora = 256, ()
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    elif variant != "cpu":
        raise ValueError(f"variant {variant!r}: expected 'cpu' or 'smoke'")
    return config
