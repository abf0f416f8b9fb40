"""ESM-2 (Lin et al. 2023): a config of the encoder for sequences of residues."""

import dataclasses

import jax
import jax.numpy as jnp

from triform.models.encoder import EncoderConfig
from triform.models.frontends import Batch, Tokens
from triform.models.mask import Mask
from triform.models.positions import POSITIONS

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class ProteinConfig(EncoderConfig):
    """ESM-2: an encoder that embeds masked tokens as zeros and rescales the others."""

    vocab_size: int = 33  # size of the alphabet data.tokenizer.kind="residues"
    num_types: int = 0  # number of token types; 0: no type embedding
    mask_id: int = 32  # id of <mask> in the tokenizer
    # Expected share of <mask> in training (ESM-2: 0.15 * 0.8). 0: <mask> is embedded
    # like any other token.
    masked_share: float = 0.12

    def frontend(self) -> Tokens:
        """Tokens, of which masked ones are left out."""
        return UnmaskedTokens(
            self.trunk,
            self.vocab_size,
            num_types=self.num_types,
            position_offset=self.position_offset,
            norm=self.trunk.norm_position == "post",
            mask_id=self.mask_id,
            masked_share=self.masked_share,
        )

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value; `mask_id` must be the tokenizer's."""
        return super().sizes() | {"mask_id": self.mask_id}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        rule = f"must lie in [0, {self.vocab_size}), model.vocab_size"
        self.require(0 <= self.mask_id < self.vocab_size, "mask_id", rule)
        rule = "must lie in [0, 1); 0 embeds <mask> like any other token"
        self.require(0 <= self.masked_share < 1, "masked_share", rule)
        added = self.num_types > 0 or self.trunk.norm_position == "post"
        scheme = POSITIONS.get(self.trunk.positions)
        self.require(
            not self.masked_share
            or not (added or (scheme is not None and scheme.embed is not None)),
            "masked_share",
            "tokens are scaled before anything is added to them or normed; set "
            "num_types=0, trunk.norm_position='pre' and trunk.positions='rotary', or "
            "masked_share=0",
        )


class UnmaskedTokens(Tokens):
    """Tokens whose masked ones are zero, the others scaled as if by dropout.

    Their factor is (1 - masked_share) / (1 - observed share of <mask>), over the
    sequence that a token is in, so that the sum over a row is what training has on
    average, whether it is masked or not.
    """

    mask_id: int = 0
    masked_share: float = 0.0

    def __call__(self, batch: Batch) -> tuple[Array, Mask]:
        """(x [B, L, D], mask) of inputs [B, L]."""
        x, mask = super().__call__(batch)
        if not self.masked_share:
            return x, mask
        masked = batch["inputs"] == self.mask_id
        kept = 1 - self.masked_share
        scale = kept / unmasked_share(masked, mask.q_segments)
        return x * jnp.where(masked, 0, scale)[..., None].astype(x.dtype), mask


def unmasked_share(masked: Array, segments: Array | None) -> Array:
    """float32 [B, L]: share of tokens that are not masked, bool [B, L], in the segment
    of each; 1 where there is no token.
    """
    if segments is None:
        segments = jnp.ones_like(masked, jnp.int32)
    rows = jnp.arange(len(masked))[:, None]
    empty = jnp.zeros((len(masked), masked.shape[1] + 1), jnp.float32)

    def count(chosen: Array) -> Array:
        """How many of its segment are chosen, at every position."""
        total = empty.at[rows, segments].add(chosen.astype(jnp.float32))
        return jnp.take_along_axis(total, segments, 1)

    # Where all is masked, nothing is scaled.
    unmasked = count(~masked & (segments > 0))
    return jnp.maximum(unmasked, 1) / jnp.maximum(count(segments > 0), 1)
