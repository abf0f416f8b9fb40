"""Kinds of data: what of a source becomes the rows of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from triform.data.batch import Batch, Sizes
from triform.data.codecs import Codec
from triform.data.datasets.base import (
    EVALUATION,
    DataConfig,
    Dataset,
    Epoch,
    TextConfig,
)
from triform.data.datasets.causal_lm import CausalLM, CausalLMConfig
from triform.data.datasets.conversations import Conversations, ConversationsConfig
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
    "CausalLMConfig",
    "ConversationsConfig",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Epoch",
    "ImagesConfig",
    "MaskedLMConfig",
    "MixtureConfig",
    "Seq2SeqConfig",
    "SequenceClassificationConfig",
    "SpanCorruptionConfig",
    "TextConfig",
    "TokenClassificationConfig",
    "dataset",
    "request_batch",
]

# config type: dataset
DATASETS = {
    Seq2SeqConfig: Seq2Seq,
    MixtureConfig: Seq2Seq,
    CausalLMConfig: CausalLM,
    ConversationsConfig: Conversations,
    MaskedLMConfig: MaskedLM,
    SpanCorruptionConfig: SpanCorruption,
    SequenceClassificationConfig: SequenceClassification,
    TokenClassificationConfig: TokenClassification,
    ImagesConfig: Images,
}


def dataset(
    config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
) -> Dataset:
    """The items of a split; `sizes` are the model's, by name."""
    return DATASETS[type(config)](config, split, codecs, sizes)


def request_batch(
    config: Any,
    lines: Sequence[str],
    rows: int,
    codecs: Mapping[str, Codec],
    first: int = 0,
) -> Batch:
    """A batch of exactly `rows` rows of these texts, of the shortest shape that holds
    all; targets are zero.

    `first` is the number of the first line. DataError for a text that is too long, and
    for a kind of data that does not read texts.
    """
    return DATASETS[type(config)].request(config, lines, rows, codecs, first)
