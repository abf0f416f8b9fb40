"""Decoder-only: GPT-2 (Radford et al. 2019), LLaMA (Touvron et al. 2023)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.cache import Cache
from triform.models.config import ModelConfig, TransformerConfig
from triform.models.frontends import Tokens
from triform.models.logits import Logits, head, tied_logits, whole
from triform.models.mask import Mask
from triform.models.transformer import Stack

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class LanguageModelConfig(ModelConfig):
    """Decoder-only language model: token embedding, causal stack and head."""

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 32_000  # vocabulary size; also of a newly trained tokenizer
    tie_head: bool = True  # the head shares the weights of the token embedding

    def frontend(self) -> Tokens:
        """Tokens and positions, causal."""
        return Tokens(self.trunk, self.vocab_size, causal=True)

    def reads(self) -> dict[str, tuple[str, str]]:
        """Field -> (axes, dtype) that a batch must have."""
        return self.frontend().reads()

    def outputs(self) -> dict[str, str]:
        """Name of an output -> name of the size of its last axis."""
        return {"targets": "vocab_size"}

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return {"vocab_size": self.vocab_size}

    def generates(self) -> bool:
        """Whether the module has `start` and `extend`."""
        return True

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require_vocabulary()
        self.trunk.validate()


class LanguageModel(nn.Module):
    """Tokens in, logits of the next tokens out."""

    config: LanguageModelConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        cfg = self.config
        self.frontend = cfg.frontend()
        nn.share_scope(self, self.frontend)
        self.decoder = Stack(cfg.trunk)
        if not cfg.tie_head:
            self.head = head(cfg.trunk, cfg.vocab_size, chunks=cfg.trunk.logit_chunks)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'targets': logits float32 [B, L, V] of the token after each input}.

        Reads inputs [B, L] and, where rows are packed or padded, segments and
        positions.
        """
        x, mask = self.frontend(batch)
        return {"targets": self._logits(self.decoder(x, mask)[0])}

    def start(
        self, batch: Mapping[str, Array], length: int
    ) -> tuple[Cache, Array, Array]:
        """Reads the prompts; returns (cache with room for `length` tokens, the last
        token of each prompt and its position, int32 [B]): what `extend` takes first.

        Prompts are inputs [B, L], at least one token each, padded anywhere: segments
        [B, L] are 0 there.
        """
        tokens = batch["inputs"]
        real = batch.get("segments", jnp.ones_like(tokens)) > 0
        positions = jnp.where(real, jnp.cumsum(real, 1) - 1, -1).astype(jnp.int32)
        last = positions.argmax(1)[:, None]
        first = jnp.take_along_axis(tokens, last, 1)[:, 0]
        at = jnp.take_along_axis(positions, last, 1)[:, 0]
        cache = Cache.empty(self.config.trunk, len(tokens), tokens.shape[1] + length)
        # The last token is fed when its logits are wanted.
        before = jnp.where(positions == at[:, None], -1, positions)
        return self._run(tokens, before, cache)[1], first, at

    def extend(
        self, tokens: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Feeds the next tokens int32 [B, l]; returns (logits [B, l, V], cache).

        At most as many tokens in all as `start` was given `length`: beyond it the last
        slots are overwritten.
        """
        x, cache = self._run(tokens, positions, cache)
        return whole(self._logits(x)), cache

    def _run(
        self, tokens: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        x = self.frontend.embed(tokens, positions)
        mask = Mask.self_attention(positions, causal=True)
        return self.decoder(x, mask, cache=cache)

    def _logits(self, x: Array) -> Array | Logits:
        if self.config.tie_head:
            chunks = self.config.trunk.logit_chunks
            return tied_logits(x, self.frontend.embedding, chunks=chunks)
        return self.head(x)
