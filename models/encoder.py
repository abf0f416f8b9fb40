"""Encoder-only: BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019), and their heads.

What is predicted is named as the batch names it: `targets` place by place (masked
tokens, or the tag of every token), `label` of the whole row (next sentence, class,
number), from the pooled first token or the mean of all.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from triform.models.attention import kernel_init
from triform.models.config import POOLS, ModelConfig, TransformerConfig
from triform.models.embedding import embedding, head, places, tied_logits
from triform.models.mask import Mask
from triform.models.matmul import dot_general
from triform.models.positions import PositionEmbedding
from triform.models.transformer import FFNS, Stack, make_norm

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class EncoderConfig(ModelConfig):
    """A bidirectional stack, its embeddings, and the heads that are wanted."""

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 32_000  # also what a tokenizer is trained to
    num_types: int = 2  # sentence A, sentence B; 0: no type embedding
    position_offset: int = 0  # RoBERTa's positions start at 2
    masked_head: bool = True  # predicts masked tokens
    num_tags: int = 0  # classes of a tag for every token, instead; 0: none
    num_labels: int = 2  # classes of a label for the row, 1: a number; 0: none
    pool: str = "token"  # what the label is read off: the first token, or the mean

    def longest(self) -> int:
        """Tokens that a row may have."""
        return self.trunk.max_len - self.position_offset

    def limits(self) -> dict[str, int]:
        """How many ids each key of a batch may hold."""
        found = {
            "inputs": self.vocab_size,
            "token_type_ids": self.num_types,
            "targets": self.vocab_size if self.masked_head else self.num_tags,
            "label": self.num_labels,
        }
        return {k: n for k, n in found.items() if n}

    def adapt(self, name: str, saved: Any, shape: tuple[int, ...]) -> Any | None:
        """Learned positions of longer rows repeat the saved ones (Beltagy et al. 2020,
        5), of shorter rows are the first of them.
        """
        if name != "positions/table/embedding" or saved.shape[1:] != shape[1:]:
            return None
        offset = self.position_offset
        rows = np.resize(saved[offset:], (shape[0] - offset, *shape[1:]))
        return np.concatenate([saved[:offset], rows])

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
            "every place has one prediction; set masked_head=False or num_tags=0",
        )
        self.require(
            self.masked_head or self.num_tags > 0 or self.num_labels > 0,
            "num_labels",
            "nothing is predicted; set it, num_tags or masked_head",
        )
        self.trunk.validate()


class MaskedHead(nn.Module):
    """BERT's transform before the tied table: dense, activation, norm."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, P, D] -> [B, P, D]."""
        cfg = self.config
        x = nn.Dense(
            cfg.d_model,
            dtype=jnp.dtype(cfg.dtype),
            kernel_init=kernel_init(cfg, "dense"),
            dot_general=dot_general,
            name="dense",
        )(x)
        return make_norm(cfg, "norm")(FFNS[cfg.ffn][0](x))


class Encoder(nn.Module):
    """Tokens in; logits of masked tokens or tags, and of the row's label, out."""

    config: EncoderConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        cfg, trunk = self.config, self.config.trunk
        self.embedding = embedding(trunk, cfg.vocab_size)
        if cfg.num_types:
            self.token_type_embedding = embedding(trunk, cfg.num_types)
        self.positions = PositionEmbedding(trunk)
        if trunk.norm_position == "post":  # pre-norm blocks bring their own
            self.embedding_norm = make_norm(trunk, None)
        self.encoder = Stack(trunk)
        self.dropout = nn.Dropout(trunk.dropout)
        if cfg.masked_head:
            self.masked_head = MaskedHead(trunk)
            self.masked_bias = self.param(
                "masked_bias", nn.initializers.zeros, (cfg.vocab_size,)
            )
        if cfg.num_tags:
            self.tag_head = head(trunk, cfg.num_tags, bias=True)
        if cfg.num_labels:
            self.pooler = nn.Dense(
                trunk.d_model,
                dtype=jnp.dtype(trunk.dtype),
                kernel_init=kernel_init(trunk, "pooler"),
            )
            self.label_head = head(trunk, cfg.num_labels, bias=True)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'targets': float32 [B, L or P, V or tags], 'label': float32 [B, labels]},
        those that the config has.

        Reads inputs [B, L] and, where they are there, segments (0: padding), positions,
        types, globals [B, L] (1: sees all and is seen by all past windows), and predict
        [B, P], the places whose tokens are predicted (without it: all).
        """
        cfg = self.config
        x = self.encode(batch)
        plain = not self.has_rng("dropout")
        out = {}
        if cfg.masked_head:
            chosen = x
            if "masked_positions" in batch:
                chosen = jnp.take_along_axis(x, batch["masked_positions"][..., None], 1)
            chosen = self.masked_head(chosen)
            out["targets"] = tied_logits(chosen, self.embedding) + self.masked_bias
        if cfg.num_tags:
            out["targets"] = self.tag_head(self.dropout(x, deterministic=plain))
        if cfg.num_labels:
            pooled = x[:, 0] if cfg.pool == "token" else mean(x, batch.get("segments"))
            pooled = nn.tanh(self.pooler(pooled))
            pooled = self.dropout(pooled, deterministic=plain)
            out["label"] = self.label_head(pooled)
        return out

    def encode(self, batch: Mapping[str, Array]) -> Array:
        """[B, L, D] of inputs [B, L]."""
        cfg, tokens = self.config, batch["inputs"]
        positions = batch.get("positions", places(tokens))
        if tokens.shape[1] > cfg.longest():
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens exceeds {cfg.longest()}, "
                "model.trunk.max_len less position_offset; raise it or shorten the data"
            )
        x = self.embedding(tokens)
        if cfg.num_types:
            x += self.token_type_embedding(
                batch.get("token_type_ids", jnp.zeros_like(tokens))
            )
        x = self.positions(x, positions + cfg.position_offset)
        if cfg.trunk.norm_position == "post":
            x = self.embedding_norm(x)
        marked = batch.get("global_attention_mask")
        marked = None if marked is None else marked > 0
        mask = Mask.self_attention(
            positions,
            batch.get("segments"),
            q_global=marked,
            kv_global=marked,
            aligned="positions" not in batch,
        )
        return self.encoder(x, mask)[0]


def mean(x: Array, segments: Array | None) -> Array:
    """[B, D]: the mean of x [B, L, D] over the places that are no padding (segment 0).

    Summed in float32.
    """
    shown = jnp.ones(x.shape[:2]) if segments is None else segments > 0
    shown = shown.astype(jnp.float32)[..., None]
    total = jnp.sum(x * shown, 1) / jnp.maximum(jnp.sum(shown, 1), 1)
    return total.astype(x.dtype)
