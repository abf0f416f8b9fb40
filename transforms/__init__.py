"""Kinds of data: what of a source becomes the rows of a batch."""

from typing import Any

from triform.tokenizer import Tokenizer
from triform.transforms.base import (
    EVALUATION,
    Batch,
    DataConfig,
    Limits,
    Pass,
    TextConfig,
    Transform,
)
from triform.transforms.images import Images, ImagesConfig
from triform.transforms.labelled import Labelled, LabelledConfig
from triform.transforms.masked import Masked, MaskedConfig
from triform.transforms.pairs import Corpus, MixtureConfig, Pairs, PairsConfig
from triform.transforms.spans import Spans, SpansConfig
from triform.transforms.tagged import Tagged, TaggedConfig
from triform.transforms.windows import Windows, WindowsConfig

__all__ = [
    "EVALUATION",
    "TRANSFORMS",
    "Batch",
    "Corpus",
    "DataConfig",
    "ImagesConfig",
    "LabelledConfig",
    "Limits",
    "MaskedConfig",
    "MixtureConfig",
    "PairsConfig",
    "Pass",
    "SpansConfig",
    "TaggedConfig",
    "TextConfig",
    "Transform",
    "WindowsConfig",
    "empty",
    "needs_tokenizer",
    "open",
]

# config type: transform
TRANSFORMS = {
    PairsConfig: Pairs,
    MixtureConfig: Pairs,
    WindowsConfig: Windows,
    MaskedConfig: Masked,
    SpansConfig: Spans,
    LabelledConfig: Labelled,
    TaggedConfig: Tagged,
    ImagesConfig: Images,
}


def open(config: Any, split: str, tok: Tokenizer | None, limits: Limits) -> Transform:
    """The items of a split; `limits` is how many ids the model knows, by batch key."""
    return TRANSFORMS[type(config)](config, split, tok, limits)


def empty(config: Any, rows: int, length: int, limits: Limits) -> Batch:
    """What every batch holds, zero; needs no data."""
    return TRANSFORMS[type(config)].empty(config, rows, length, limits)


def needs_tokenizer(config: Any) -> bool:
    """Whether items are tokens."""
    return isinstance(config, TextConfig)
