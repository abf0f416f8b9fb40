"""Text to text: sentiment, intent and translation by one model, told by a prefix.

    python train.py --config=configs/t5_multitask.py --workdir=DIR \
        --config.init_from=PRETRAINED

PRETRAINED is a workdir of configs/t5_books.py:cpu.

Measured on 2 cores of an AMD EPYC, one seed, after 4,000 steps (1.3 a second where
nothing else ran) from 2,000 of that kind, on all test examples, decoded greedily:
sentiment 72.4 % exact, intent 88.4 %, translation BLEU 30.9 (sacreBLEU's 13a, cased).
With Adam at 1e-3, rsqrt, and label smoothing of 0.1, pre-training with Adam too, 2,000
steps came to 50.6 %, 2.3 % and 2.4.
"""

from triform.configs import t5_books
from triform.configs.schema import ExperimentConfig
from triform.data.datasets import Corpus, MixtureConfig
from triform.models.decode import DecodeConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import TokenPredictionConfig


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (for 2 cores), 'smoke'."""
    pretraining = t5_books.get_config("smoke" if variant == "smoke" else "cpu")
    model = pretraining.model
    model.trunk.dropout = 0.1
    config = ExperimentConfig(
        model=model,
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=MixtureConfig(
            corpora=(
                Corpus("mr_sentiment", "text", "label", "sentiment: "),
                Corpus("clinc150", "text", "intent", "intent: "),
                Corpus(
                    "multi30k_translate", "en", "de", "translate English to German: "
                ),
            ),
            temperature=2.0,  # sqrt: the small sets are not drowned
            max_len=64,
            batch_size=64,
            buckets=(16, 32),
            tokenizer=pretraining.data.tokenizer,
        ),
        optim=pretraining.optim,
        decode=DecodeConfig(method="greedy", max_len=40),
        evaluation=EvaluationConfig(
            every=1000, metrics=("exact_match", "bleu"), examples=100
        ),
        checkpoint=CheckpointConfig(every=500, keep_newest=2),
        steps=4000,
    )
    if variant == "smoke":
        config.data.train_split = config.data.eval_split = "validation[:16]"
        config.data.test_split = "validation[:16]"
        config.data.batch_size, config.data.max_len, config.data.buckets = 8, 32, ()
        config.decode.max_len = 8
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    elif variant:
        raise ValueError(f"variant {variant!r}: expected '' or 'smoke'")
    return config
