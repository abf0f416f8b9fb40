"""Encoder-decoder: the Transformer of Vaswani et al. 2017, T5, Marian."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.cache import Cache
from triform.models.config import ModelConfig, TransformerConfig
from triform.models.embedding import embedding
from triform.models.frontends import Tokens, array_positions
from triform.models.logits import Logits, head, tied_logits, whole
from triform.models.mask import Mask
from triform.models.positions import PositionEmbedding
from triform.models.transformer import Stack

Array = jax.Array
SCALES = ("input", "head", "none")


@dataclasses.dataclass(unsafe_hash=True)
class EncoderDecoderConfig(ModelConfig):
    """Encoder-decoder: embeddings, two stacks and the head.

    Both are of one trunk, and the source is tokens; a config with another encoder or
    another source overrides `encoder_trunk` or `frontend`.
    """

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 32_000  # vocabulary size; also of a newly trained tokenizer
    share_embeddings: bool = True  # source and target share one embedding table
    tie_head: bool = True  # the head shares the weights of the target embedding
    head_bias: bool = False  # the head has a bias (as in Marian)
    # Scale of embeddings. input: inputs times sqrt(D) (Vaswani et al. 2017, 3.4);
    # head: logits times 1 / sqrt(D) (T5); none (T5 v1.1).
    embedding_scale: str = "input"

    def encoder_trunk(self) -> TransformerConfig:
        """The trunk of the encoder."""
        return self.trunk

    def frontend(self) -> nn.Module:
        """The source, one of models.frontends with the prefix "encoder_"."""
        return Tokens(
            self.encoder_trunk(),
            self.vocab_size,
            scale=self.input_scale(),
            stddev=self.stddev(),
            prefix="encoder_",
        )

    def input_scale(self) -> float:
        """Factor on embeddings."""
        return self.trunk.d_model**0.5 if self.embedding_scale == "input" else 1.0

    def stddev(self) -> float:
        """Of a new table: unit variance as an input, whatever the scale."""
        return 1 / self.input_scale()

    def reads(self) -> dict[str, tuple[str, str]]:
        """Field -> (axes, dtype) that a batch must have."""
        return self.frontend().reads() | {"inputs": ("BL", "int32")}

    def outputs(self) -> dict[str, str]:
        """Name of an output -> name of the size of its last axis."""
        return {"targets": "vocab_size"}

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return {"vocab_size": self.vocab_size}

    def longest(self) -> dict[str, int]:
        """Axis letter -> longest row that the model takes."""
        return self.frontend().longest() | {"L": self.trunk.max_len}

    def axes(self) -> dict[str, int]:
        """Axis letter -> the size that every batch must have."""
        return self.frontend().axes()

    def generates(self) -> bool:
        """Whether the module has `start` and `extend`."""
        return True

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require_vocabulary()
        rule = f"expected one of {', '.join(SCALES)}"
        self.require(self.embedding_scale in SCALES, "embedding_scale", rule)
        self.require(
            not self.share_embeddings or isinstance(self.frontend(), Tokens),
            "share_embeddings",
            "the source is not tokens; set it to False",
        )
        self.trunk.validate()


class EncoderDecoder(nn.Module):
    """A source in, logits of target tokens out.

    By default one table serves both inputs and the head (Vaswani et al. 2017, 3.4).
    """

    config: EncoderDecoderConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        cfg, trunk = self.config, self.config.trunk
        # A learned table of positions is the decoder's own.
        self.frontend = cfg.frontend()
        nn.share_scope(self, self.frontend)
        if not cfg.share_embeddings:
            self.target_embedding = embedding(trunk, cfg.vocab_size, cfg.stddev())
        self.decoder_positions = PositionEmbedding(trunk)
        self.encoder = Stack(cfg.encoder_trunk())
        self.decoder = Stack(trunk, cross=True)
        if not cfg.tie_head:
            self.head = head(trunk, cfg.vocab_size, chunks=trunk.logit_chunks)
        if cfg.head_bias:
            self.head_bias = self.param(
                "head_bias", nn.initializers.zeros, (cfg.vocab_size,)
            )

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'targets': logits float32 [B, L, V] of the token after each input}.

        Reads what the frontend reads (encoder_inputs, encoder_segments [B, S]), inputs
        [B, L] (targets shifted right), and, where rows are packed, segments and
        positions of both sides.
        """
        memory, source = self.encode(batch)
        tokens, segments = batch["inputs"], batch.get("segments")
        aligned = "positions" not in batch
        positions = batch.get("positions", array_positions(tokens))
        mask = Mask.self_attention(positions, segments, causal=True, aligned=aligned)
        # Without target segments every row is one sequence: segment 1.
        if segments is None and source.kv_segments is not None:
            segments = jnp.ones_like(tokens)
        memory_mask = Mask(
            positions,
            source.kv_positions,
            segments if source.kv_segments is not None else None,
            source.kv_segments,
            aligned=aligned and source.aligned,
        )
        x = self._embed_targets(tokens, positions)
        x, _ = self.decoder(x, mask, memory=memory, memory_mask=memory_mask)
        return {"targets": self._logits(x)}

    def encode(self, batch: Mapping[str, Array]) -> tuple[Array, Mask]:
        """Memory [B, S, D], and a mask whose key side describes it."""
        x, mask = self.frontend(batch)
        return self.encoder(x, mask)[0], mask

    def start(
        self, batch: Mapping[str, Array], length: int
    ) -> tuple[Cache, Array, Array]:
        """Encodes the source; returns (empty cache of `length` target slots, the token
        that starts the targets and its position, int32 [B]): what `extend` takes first.
        """
        memory, mask = self.encode(batch)
        where = jnp.broadcast_to(mask.kv_positions, memory.shape[:2])
        if mask.kv_segments is not None:
            where = jnp.where(mask.kv_segments > 0, where, -1)
        cache = Cache.empty(self.config.trunk, len(memory), length, where)
        # Run one empty token (position -1, nothing to see) to fill the cross caches.
        nothing = jnp.full((len(memory), 1), -1, jnp.int32)
        x = self._embed_targets(jnp.zeros_like(nothing), nothing)
        mask = Mask.self_attention(nothing, causal=True)
        memory_mask = Mask(nothing, where)
        _, cache = self.decoder(
            x, mask, memory=memory, memory_mask=memory_mask, cache=cache
        )
        cache = cache.replace(index=jnp.zeros_like(cache.index))
        first = batch["inputs"][:, 0]
        return cache, first, jnp.zeros_like(first)

    def extend(
        self, tokens: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Feeds the next tokens int32 [B, l]; returns (logits [B, l, V], cache).

        At most as many tokens in all as `start` was given `length`: beyond it the last
        slots are overwritten.
        """
        x = self._embed_targets(tokens, positions)
        mask = Mask.self_attention(positions, causal=True)
        memory_mask = Mask(positions, cache.memory_positions)
        x, cache = self.decoder(x, mask, memory_mask=memory_mask, cache=cache)
        return whole(self._logits(x)), cache

    def _embed_targets(self, tokens: Array, positions: Array) -> Array:
        x = self._target_table()(tokens)
        scale = self.config.input_scale()
        if scale != 1.0:
            x = x * jnp.asarray(scale, x.dtype)
        return self.decoder_positions(x, positions)

    def _target_table(self) -> nn.Embed:
        shared = self.config.share_embeddings
        return self.frontend.embedding if shared else self.target_embedding

    def _logits(self, x: Array) -> Array | Logits:
        cfg = self.config
        if cfg.embedding_scale == "head":
            x = x * jnp.asarray(cfg.trunk.d_model**-0.5, x.dtype)
        bias = self.head_bias if cfg.head_bias else None
        if cfg.tie_head:
            chunks = cfg.trunk.logit_chunks
            return tied_logits(x, self._target_table(), bias, chunks)
        return self.head(x, bias=bias)
