"""Encoder-decoder: the Transformer of Vaswani et al. 2017, T5, Marian."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import ModelConfig, TransformerConfig
from triform.models.embedding import embedding, head, places, tied_logits
from triform.models.mask import Mask
from triform.models.positions import PositionEmbedding
from triform.models.transformer import Cache, Stack

Array = jax.Array
SCALES = ("input", "head", "none")


@dataclasses.dataclass(unsafe_hash=True)
class EncoderDecoderConfig(ModelConfig):
    """Two stacks of the same trunk, their embeddings and the head."""

    reads = ("encoder_inputs", "encoder_segments", "inputs")

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 32_000  # also what a tokenizer is trained to
    share_embeddings: bool = True  # one table for source and target tokens
    tie_head: bool = True  # the head is the target table, transposed
    head_bias: bool = False  # Marian has one
    # Where a table is scaled: by sqrt(D) as an input (Vaswani et al. 2017, 3.4), by
    # 1 / sqrt(D) as the head (T5), or nowhere (T5 v1.1).
    embedding_scale: str = "input"

    def limits(self) -> dict[str, int]:
        """How many ids each key of a batch may hold."""
        keys = ("encoder_inputs", "inputs", "targets")
        return dict.fromkeys(keys, self.vocab_size)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require_vocabulary()
        rule = f"expected one of {', '.join(SCALES)}"
        self.require(self.embedding_scale in SCALES, "embedding_scale", rule)
        self.trunk.validate()


class EncoderDecoder(nn.Module):
    """Source tokens in, logits of target tokens out.

    By default one table serves both inputs and the head (Vaswani et al. 2017, 3.4).
    """

    config: EncoderDecoderConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        cfg = self.config
        trunk = cfg.trunk

        # Unit variance as an input, whatever the scale.
        stddev = trunk.d_model**-0.5 if cfg.embedding_scale == "input" else 1.0
        self.embedding = embedding(trunk, cfg.vocab_size, stddev)
        if not cfg.share_embeddings:
            self.target_embedding = embedding(trunk, cfg.vocab_size, stddev)
        # A learned table is the decoder's own; sinusoids have no parameters.
        self.encoder_positions = PositionEmbedding(trunk)
        self.decoder_positions = PositionEmbedding(trunk)
        self.encoder = self.make_encoder()
        self.decoder = Stack(trunk, cross=True)
        if not cfg.tie_head:
            self.head = head(trunk, cfg.vocab_size)
        if cfg.head_bias:
            self.head_bias = self.param(
                "head_bias", nn.initializers.zeros, (cfg.vocab_size,)
            )

    def make_encoder(self) -> nn.Module:
        """The encoder; a model with another one overrides this."""
        return Stack(self.config.trunk)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'targets': logits float32 [B, L, V] of the token after each input}.

        Reads encoder_inputs and encoder_segments [B, S], inputs [B, L] (targets shifted
        right), and, where rows are packed, segments and positions of both sides.
        """
        memory, memory_mask = self.encode(batch)
        tokens = batch["inputs"]
        positions = batch.get("positions", places(tokens))
        segments = batch.get("segments")
        aligned = "positions" not in batch
        mask = Mask.self_attention(positions, segments, causal=True, aligned=aligned)
        # Without target segments every row is one sequence: segment 1.
        q_segments = jnp.ones_like(tokens) if segments is None else segments
        memory_mask = memory_mask.replace(
            q_positions=positions,
            q_segments=q_segments,
            aligned=aligned and memory_mask.aligned,
        )
        x = self.decoder_positions(self._embed_targets(tokens), positions)
        x, _ = self.decoder(x, mask, memory=memory, memory_mask=memory_mask)
        return {"targets": self._logits(x)}

    def encode(self, batch: Mapping[str, Array]) -> tuple[Array, Mask]:
        """Memory [B, S, D], and a mask whose key side describes it."""
        tokens, segments = batch["encoder_inputs"], batch["encoder_segments"]
        positions = batch.get("encoder_positions", places(tokens))
        aligned = "encoder_positions" not in batch
        mask = Mask.self_attention(positions, segments, aligned=aligned)
        x = self._scale(self.embedding(tokens))
        x, _ = self.encoder(self.encoder_positions(x, positions), mask)
        return x, mask

    def start(
        self, batch: Mapping[str, Array], length: int
    ) -> tuple[Cache, Array, Array]:
        """Encodes the source; returns (empty cache of `length` target slots, the token
        that starts the targets and its position, int32 [B]): what `extend` takes first.
        """
        memory, mask = self.encode(batch)
        shape = batch["encoder_inputs"].shape
        where = jnp.broadcast_to(mask.kv_positions, shape)
        where = jnp.where(mask.kv_segments > 0, where, -1)
        cache = Cache.empty(self.config.trunk, shape[0], length, where)
        # Run one empty token (position -1, nothing to see) to fill the cross caches.
        nothing = jnp.full((shape[0], 1), -1, jnp.int32)
        x = self._embed_targets(jnp.zeros_like(nothing))
        mask = Mask.self_attention(nothing, causal=True)
        memory_mask = Mask(nothing, where)
        _, cache = self.decoder(
            x, mask, memory=memory, memory_mask=memory_mask, cache=cache
        )
        cache = cache.replace(index=jnp.zeros_like(cache.index))
        first = batch["inputs"][:, 0]
        return cache, first, jnp.zeros_like(first)

    def extend(self, tokens: Array, positions: Array, cache: Cache):
        """Feeds the next tokens int32 [B, l]; returns (logits [B, l, V], cache).

        At most as many tokens in all as `start` was given `length`: beyond it the last
        slots are overwritten.
        """
        x = self.decoder_positions(self._embed_targets(tokens), positions)
        mask = Mask.self_attention(positions, causal=True)
        memory_mask = Mask(positions, cache.memory_positions)
        x, cache = self.decoder(x, mask, memory_mask=memory_mask, cache=cache)
        return self._logits(x), cache

    def _embed_targets(self, tokens: Array) -> Array:
        return self._scale(self._target_table()(tokens))

    def _target_table(self) -> nn.Embed:
        shared = self.config.share_embeddings
        return self.embedding if shared else self.target_embedding

    def _scale(self, x: Array) -> Array:
        if self.config.embedding_scale != "input":
            return x
        return x * jnp.asarray(self.config.trunk.d_model**0.5, x.dtype)

    def _logits(self, x: Array) -> Array:
        cfg = self.config
        if cfg.embedding_scale == "head":
            x = x * jnp.asarray(cfg.trunk.d_model**-0.5, x.dtype)
        logits = tied_logits(x, self._target_table()) if cfg.tie_head else self.head(x)
        return logits + self.head_bias if cfg.head_bias else logits
