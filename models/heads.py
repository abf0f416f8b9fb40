"""Heads: from the trunk's output to logits.

A head is a module with

    head(x [B, L, D], mask, batch, frontend) -> {output: logits}
    head.outputs() -> {output: name of the size of its last axis}

Parameters are those of the model itself. Logits are float32; those of a vocabulary
come in parts if trunk.logit_chunks is above 1 (models/logits.py).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.feed_forward import FFNS
from triform.models.layers import dense, dropout, make_norm
from triform.models.logits import Logits, head, tied_logits
from triform.models.mask import Mask

Array = jax.Array
Batch = Mapping[str, Array]


class Transform(nn.Module):
    """BERT's transform before the tied table: dense, activation, norm."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, P, D] -> [B, P, D]."""
        cfg = self.config
        x = dense(cfg, cfg.d_model, "dense", bias=True)(x)
        return make_norm(cfg, "norm")(FFNS[cfg.ffn][0](x))


class MaskedHead(nn.Module):
    """{'targets': [B, P, V]}: which token of the vocabulary each position holds.

    Of masked_positions int32 [B, P] if the batch has them, else of all, P = L.
    Parameters: masked_head/{dense, norm}, masked_bias; the table is the frontend's.
    """

    config: TransformerConfig

    @nn.nowrap
    def outputs(self) -> dict[str, str]:
        """Logits over the vocabulary."""
        return {"targets": "vocab_size"}

    @nn.compact
    def __call__(
        self, x: Array, mask: Mask, batch: Batch, frontend: nn.Module
    ) -> dict[str, Array | Logits]:
        """See the class."""
        if "masked_positions" in batch:
            x = jnp.take_along_axis(x, batch["masked_positions"][..., None], 1)
        x = Transform(self.config, name="masked_head")(x)
        shape = (frontend.vocab_size,)
        bias = self.param("masked_bias", nn.initializers.zeros, shape)
        chunks = self.config.logit_chunks
        return {"targets": tied_logits(x, frontend.embedding, bias, chunks)}


class TagHead(nn.Module):
    """{'targets': [B, L, classes]}: a class of every token. Parameters: tag_head."""

    config: TransformerConfig
    num_tags: int

    @nn.nowrap
    def outputs(self) -> dict[str, str]:
        """Logits over the classes."""
        return {"targets": "num_tags"}

    @nn.compact
    def __call__(
        self, x: Array, mask: Mask, batch: Batch, frontend: nn.Module
    ) -> dict[str, Array]:
        """See the class."""
        classify = head(self.config, self.num_tags, bias=True, name="tag_head")
        return {"targets": classify(dropout(self, x, "tag_dropout"))}


class LabelHead(nn.Module):
    """{'label': [B, classes]}: a class of the row, or a number with one class.

    Pools the first token or the mean (config.POOLS); with `pooler` a dense layer, tanh
    and dropout follow (Devlin et al. 2019). Parameters: pooler, label_head.
    """

    config: TransformerConfig
    num_labels: int
    pool: str = "token"
    pooler: bool = False

    @nn.nowrap
    def outputs(self) -> dict[str, str]:
        """Logits over the classes."""
        return {"label": "num_labels"}

    @nn.compact
    def __call__(
        self, x: Array, mask: Mask, batch: Batch, frontend: nn.Module
    ) -> dict[str, Array]:
        """See the class."""
        cfg = self.config
        x = x[:, 0] if self.pool == "token" else mean(x, mask.q_segments)
        if self.pooler:
            x = nn.tanh(dense(cfg, cfg.d_model, "pooler", bias=True)(x))
            x = dropout(self, x, "label_dropout")
        return {"label": head(cfg, self.num_labels, bias=True, name="label_head")(x)}


def mean(x: Array, segments: Array | None) -> Array:
    """[B, D]: the mean of x [B, L, D] over the positions that are not padding.

    Padding has segment 0. Summed in float32.
    """
    if segments is None:
        return x.mean(1)
    shown = (segments > 0).astype(jnp.float32)[..., None]
    total = jnp.sum(x * shown, 1) / jnp.maximum(jnp.sum(shown, 1), 1)
    return total.astype(x.dtype)
