"""Text to text: sentiment, intent and translation by one model, chosen by a prefix.

    python train.py --config=configs/t5_multitask.py --workdir=DIR \
        --config.init_from=PRETRAINED

PRETRAINED is a workdir of configs/t5_books.py:cpu.

Measured on 2 cores of an AMD EPYC, one seed: 4,000 steps (1.3 per second without other
jobs), starting from 2,000 steps of configs/t5_books.py:cpu. On all test examples,
decoded greedily: sentiment 72.4 % exact, intent 88.4 %, translation BLEU 30.9
(sacreBLEU's 13a, cased). With Adam at 1e-3, rsqrt and label smoothing of 0.1, and with
Adam in pre-training too, 2,000 steps reached 50.6 %, 2.3 % and 2.4.
"""

import functools

from triform.configs import t5_books
from triform.configs.schema import (
    CheckpointConfig,
    Corpus,
    DecodeConfig,
    EvaluationConfig,
    ExperimentConfig,
    MixtureConfig,
    TokenPredictionConfig,
    smoke,
    vary,
)

CORPORA = (
    Corpus("mr_sentiment", "text", "label", "sentiment: "),
    Corpus("clinc150", "text", "intent", "intent: "),
    Corpus("multi30k_translate", "en", "de", "translate English to German: "),
)
VARIANTS = {
    "": {},
    "smoke": (
        {"data.tokenizer.corpora": ()},
        functools.partial(smoke, split="validation[:16]"),
    ),
}


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (for 2 cores), 'smoke'."""
    pretraining = t5_books.get_config("cpu")
    config = ExperimentConfig(
        model=pretraining.model,
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=MixtureConfig(
            corpora=CORPORA,
            temperature=2.0,  # sqrt: raises the shares of the small corpora
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
    config.model.trunk.dropout = 0.1
    return vary(config, VARIANTS, variant)
