"""Encoder-decoder: the Transformer of Vaswani et al. 2017."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.positions import PositionEmbedding
from triform.models.transformer import Cache, Stack

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class EncoderDecoderConfig:
    """Two stacks of the same trunk, their embeddings and the head."""

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 32_000  # also what a tokenizer is trained to
    share_embeddings: bool = True  # one table for source and target tokens
    tie_head: bool = True  # the head is the target table, transposed

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if self.vocab_size < 4:
            raise ValueError(
                f"model.vocab_size={self.vocab_size}: must be at least 4 (pad, eos, "
                "unk and a token)"
            )
        self.trunk.validate()


class EncoderDecoder(nn.Module):
    """Source tokens in, logits of target tokens out.

    Embeddings are scaled by sqrt(D) and, by default, shared between both inputs and the
    head (Vaswani et al. 2017, 3.4).
    """

    config: EncoderDecoderConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        cfg = self.config
        trunk = cfg.trunk

        def embed() -> nn.Embed:
            # Unit variance after the sqrt(D) scaling.
            init = nn.initializers.normal(trunk.d_model**-0.5)
            dtype = jnp.dtype(trunk.dtype)
            return nn.Embed(
                cfg.vocab_size, trunk.d_model, dtype=dtype, embedding_init=init
            )

        self.embedding = embed()
        if not cfg.share_embeddings:
            self.target_embedding = embed()
        # A learned table is the decoder's own; sinusoids have no parameters.
        self.encoder_positions = PositionEmbedding(trunk)
        self.decoder_positions = PositionEmbedding(trunk)
        self.encoder = self.make_encoder()
        self.decoder = Stack(trunk, cross=True)
        if not cfg.tie_head:
            # Logits are accumulated in float32: in bfloat16 the best ones would tie.
            self.head = nn.Dense(
                cfg.vocab_size,
                use_bias=False,
                dtype=jnp.dtype(trunk.dtype),
                dot_general=functools.partial(
                    jax.lax.dot_general, preferred_element_type=jnp.float32
                ),
            )

    def make_encoder(self) -> nn.Module:
        """The encoder; a model with another one overrides this."""
        return Stack(self.config.trunk)

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        """Logits float32 [B, L, V] of the token after each of batch['inputs'].

        Reads encoder_inputs and encoder_segments [B, S], inputs [B, L] (targets shifted
        right), and, where rows are packed, segments and positions of both sides.
        """
        memory, memory_mask = self.encode(batch)
        tokens = batch["inputs"]
        positions = batch.get("positions", _arange(tokens))
        segments = batch.get("segments")
        mask = Mask.self_attention(positions, segments, causal=True)
        # Without target segments every row is one sequence: segment 1.
        q_segments = jnp.ones_like(tokens) if segments is None else segments
        memory_mask = memory_mask.replace(q_positions=positions, q_segments=q_segments)
        x = self.decoder_positions(self._embed_targets(tokens), positions)
        x, _ = self.decoder(x, mask, memory=memory, memory_mask=memory_mask)
        return self._logits(x)

    def encode(self, batch: Mapping[str, Array]) -> tuple[Array, Mask]:
        """Memory [B, S, D], and a mask whose key side describes it."""
        tokens, segments = batch["encoder_inputs"], batch["encoder_segments"]
        positions = batch.get("encoder_positions", _arange(tokens))
        mask = Mask.self_attention(positions, segments)
        x = self._scale(self.embedding(tokens))
        x, _ = self.encoder(self.encoder_positions(x, positions), mask)
        return x, mask

    def start(self, batch: Mapping[str, Array], length: int) -> Cache:
        """Encodes the source and returns an empty cache of `length` target slots."""
        memory, mask = self.encode(batch)
        where = jnp.where(mask.kv_segments > 0, mask.kv_positions, -1)
        cache = Cache.empty(self.config.trunk, memory.shape[0], length, where)
        # Run one empty token (position -1, nothing to see) to fill the cross caches.
        nothing = jnp.full((memory.shape[0], 1), -1, jnp.int32)
        x = self._embed_targets(jnp.zeros_like(nothing))
        mask = Mask.self_attention(nothing, causal=True)
        memory_mask = Mask(nothing, where)
        _, cache = self.decoder(
            x, mask, memory=memory, memory_mask=memory_mask, cache=cache
        )
        return cache.replace(index=jnp.zeros_like(cache.index))

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
        return x * jnp.asarray(self.config.trunk.d_model**0.5, x.dtype)

    def _logits(self, x: Array) -> Array:
        if not self.config.tie_head:
            return self.head(x)
        table = self._target_table().embedding.astype(x.dtype)
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)


def _arange(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
