"""Kinds of data: what of a source becomes the rows of a batch."""

from typing import Any

from triform.data.codecs.text import Tokenizer
from triform.data.datasets.base import (
    EVALUATION,
    Batch,
    DataConfig,
    Dataset,
    Epoch,
    Limits,
    TextConfig,
)
from triform.data.datasets.causal_lm import CausalLM, CausalLMConfig
from triform.data.datasets.images import Images, ImagesConfig
from triform.data.datasets.masked_lm import MaskedLM, MaskedLMConfig
from triform.data.datasets.seq2seq import Corpus, MixtureConfig, Seq2Seq, Seq2SeqConfig
from triform.data.datasets.sequence_classification import (
    SequenceClassification,
    SequenceClassificationConfig,
)
from triform.data.datasets.span_corruption import SpanCorruption, SpanCorruptionConfig
from triform.data.datasets.token_classification import (
    TokenClassification,
    TokenClassificationConfig,
)

__all__ = [
    "DATASETS",
    "EVALUATION",
    "Batch",
    "CausalLMConfig",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Epoch",
    "ImagesConfig",
    "Limits",
    "MaskedLMConfig",
    "MixtureConfig",
    "Seq2SeqConfig",
    "SequenceClassificationConfig",
    "SpanCorruptionConfig",
    "TextConfig",
    "TokenClassificationConfig",
    "empty",
    "needs_tokenizer",
    "open",
]

# config type: dataset
DATASETS = {
    Seq2SeqConfig: Seq2Seq,
    MixtureConfig: Seq2Seq,
    CausalLMConfig: CausalLM,
    MaskedLMConfig: MaskedLM,
    SpanCorruptionConfig: SpanCorruption,
    SequenceClassificationConfig: SequenceClassification,
    TokenClassificationConfig: TokenClassification,
    ImagesConfig: Images,
}


def open(config: Any, split: str, tok: Tokenizer | None, limits: Limits) -> Dataset:
    """The items of a split; `limits` is how many ids the model knows, by batch key."""
    return DATASETS[type(config)](config, split, tok, limits)


def empty(config: Any, rows: int, length: int, limits: Limits) -> Batch:
    """What every batch holds, zero; needs no data."""
    return DATASETS[type(config)].empty(config, rows, length, limits)


def needs_tokenizer(config: Any) -> bool:
    """Whether items are tokens."""
    return isinstance(config, TextConfig)
