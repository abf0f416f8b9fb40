"""Kinds of data: what of a source becomes the rows of a batch."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
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
from triform.data.datasets.captions import (
    CaptionedImages,
    CaptionedImagesConfig,
    ImageCodes,
    ImageCodesConfig,
)
from triform.data.datasets.causal_lm import CausalLM, CausalLMConfig
from triform.data.datasets.conversations import Conversations, ConversationsConfig
from triform.data.datasets.images import Images, ImagesConfig
from triform.data.datasets.interactions import (
    Interactions,
    InteractionsConfig,
    MaskedInteractions,
    MaskedInteractionsConfig,
)
from triform.data.datasets.masked_lm import MaskedLM, MaskedLMConfig
from triform.data.datasets.music import (
    MusicInpainting,
    MusicInpaintingConfig,
    MusicTokens,
    MusicTokensConfig,
)
from triform.data.datasets.piano_roll import Frames, FramesConfig
from triform.data.datasets.requests import Item, Requests
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
from triform.runtime.errors import DataError

__all__ = [
    "DATASETS",
    "EVALUATION",
    "CaptionedImagesConfig",
    "CausalLMConfig",
    "ConversationsConfig",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Epoch",
    "FramesConfig",
    "ImageCodesConfig",
    "ImagesConfig",
    "InteractionsConfig",
    "Item",
    "MaskedInteractionsConfig",
    "MaskedLMConfig",
    "MixtureConfig",
    "MusicInpaintingConfig",
    "MusicTokensConfig",
    "Requests",
    "Seq2SeqConfig",
    "SequenceClassificationConfig",
    "SpanCorruptionConfig",
    "TextConfig",
    "TokenClassificationConfig",
    "dataset",
    "request_batch",
    "requests",
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
    CaptionedImagesConfig: CaptionedImages,
    ImageCodesConfig: ImageCodes,
    MusicTokensConfig: MusicTokens,
    MusicInpaintingConfig: MusicInpainting,
    FramesConfig: Frames,
    InteractionsConfig: Interactions,
    MaskedInteractionsConfig: MaskedInteractions,
}


def dataset(
    config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
) -> Dataset:
    """The items of a split; `sizes` are the model's, by name."""
    return DATASETS[type(config)](config, split, codecs, sizes)


def requests(config: Any, codecs: Mapping[str, Codec], sizes: Sizes) -> Requests:
    """What a model of this kind of data is asked and answers."""
    return DATASETS[type(config)].requests(config, codecs, sizes)


def request_batch(
    config: Any,
    inputs: Sequence[Any],
    rows: int,
    codecs: Mapping[str, Codec],
    sizes: Sizes = MappingProxyType({}),
) -> Batch:
    """A batch of exactly `rows` rows of these requests, of the shortest shape that
    holds all; targets are zero.

    `sizes` are the model's, for axes that have the size of one. DataError for a request
    that cannot be read or is too long.
    """
    kind = requests(config, codecs, sizes)
    if not kind.answers():
        raise DataError(
            f"data={type(config).__name__}: there are no requests of this kind of data"
        )
    items = [kind.read(request) for request in inputs]
    batch, left_out = kind.batch(items, rows)
    for number, (request, left) in enumerate(zip(inputs, left_out, strict=True)):
        if left:
            raise DataError(
                f"request {number + 1} ({request!r:.40}): {left} tokens too long for "
                f"{kind.limit()}; shorten or split it"
            )
    return batch
