"""Encoder-only: BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019).

One module for every config that names a frontend and heads: see also vision.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np
from flax import linen as nn

from triform.models.config import (
    POOLS,
    POSITION_TABLE,
    ModelConfig,
    TransformerConfig,
    nonzero,
)
from triform.models.frontends import Tokens
from triform.models.heads import LabelHead, MaskedHead, TagHead
from triform.models.transformer import Stack

Array = jax.Array


class FrontendConfig(ModelConfig):
    """Base of the configs that `Encoder` serves."""

    def frontend(self) -> nn.Module:
        """One of models.frontends."""
        raise NotImplementedError

    def heads(self) -> tuple[nn.Module, ...]:
        """Some of models.heads."""
        raise NotImplementedError

    def reads(self) -> dict[str, tuple[str, str]]:
        """Field -> (axes, dtype) that a batch must have."""
        return self.frontend().reads()

    def outputs(self) -> dict[str, str]:
        """Name of an output -> name of the size of its last axis."""
        return {k: v for head in self.heads() for k, v in head.outputs().items()}

    def longest(self) -> dict[str, int]:
        """Axis letter -> longest row that the model takes."""
        return self.frontend().longest()

    def axes(self) -> dict[str, int]:
        """Axis letter -> the size that every batch must have."""
        return self.frontend().axes()


@dataclasses.dataclass(unsafe_hash=True)
class EncoderConfig(FrontendConfig):
    """Encoder: embeddings, a bidirectional stack and the chosen heads."""

    HEADS: ClassVar[tuple[str, ...]] = ("masked_head", "num_tags", "num_labels", "pool")

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 32_000  # vocabulary size; also of a newly trained tokenizer
    num_types: int = 2  # number of token types (text A, text B); 0: no type embedding
    position_offset: int = 0  # number of the first position (RoBERTa: 2)
    masked_head: bool = True  # has a head that predicts masked tokens
    num_tags: int = 0  # tag classes of the head per token; 0: no such head
    num_labels: int = 2  # classes of the head per row; 1: a number; 0: no such head
    pool: str = "token"  # input of the head per row: first token, or mean

    def frontend(self) -> Tokens:
        """Tokens, token types and positions."""
        return Tokens(
            self.trunk,
            self.vocab_size,
            num_types=self.num_types,
            position_offset=self.position_offset,
            # Pre-norm blocks bring their own.
            norm=self.trunk.norm_position == "post",
        )

    def heads(self) -> tuple[nn.Module, ...]:
        """Those that the fields ask for."""
        heads: list[nn.Module] = []
        if self.masked_head:
            heads.append(MaskedHead(self.trunk))
        if self.num_tags:
            heads.append(TagHead(self.trunk, self.num_tags))
        if self.num_labels:
            head = LabelHead(self.trunk, self.num_labels, self.pool, pooler=True)
            heads.append(head)
        return tuple(heads)

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value; those that are 0 are left out."""
        return nonzero(self, "vocab_size", "num_types", "num_tags", "num_labels")

    def adapt(
        self, name: str, saved: np.ndarray, fresh: np.ndarray
    ) -> tuple[np.ndarray, str] | None:
        """Learned positions of longer rows repeat the saved ones (Beltagy et al. 2020,
        5), of shorter rows are the first of them. The rest as in the base class.
        """
        longer = len(fresh) > len(saved)
        if name != POSITION_TABLE or not longer or saved.shape[1:] != fresh.shape[1:]:
            return super().adapt(name, saved, fresh)
        offset = self.position_offset
        rows = np.resize(saved[offset:], (len(fresh) - offset, *fresh.shape[1:]))
        values = np.concatenate([saved[:offset], rows])
        return values, f"positions repeated to {len(rows)}"

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require_vocabulary()
        for name in ("num_types", "position_offset", "num_tags", "num_labels"):
            self.require(getattr(self, name) >= 0, name, "must be at least 0")
        rule = f"expected one of {', '.join(POOLS)}"
        self.require(self.pool in POOLS, "pool", rule)
        self.require(
            not (self.masked_head and self.num_tags),
            "num_tags",
            "every position has one prediction; set masked_head=False or num_tags=0",
        )
        self.require(
            self.masked_head or self.num_tags > 0 or self.num_labels > 0,
            "num_labels",
            "nothing is predicted; set it, num_tags or masked_head",
        )
        self.trunk.validate()


class Encoder(nn.Module):
    """Frontend, bidirectional stack, heads.

    Parameters of the frontend and of the heads lie beside `encoder`, the stack's.
    """

    config: FrontendConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        self.frontend = self.config.frontend()
        self.encoder = Stack(self.config.trunk)
        self.heads = self.config.heads()
        for module in (self.frontend, *self.heads):
            nn.share_scope(self, module)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The heads' logits by output, float32; see there for what they read."""
        x, mask = self.frontend(batch)
        x, _ = self.encoder(x, mask)
        outputs = [head(x, mask, batch, self.frontend) for head in self.heads]
        return {name: y for output in outputs for name, y in output.items()}
