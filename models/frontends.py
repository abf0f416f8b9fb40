"""Frontends: from a batch to the trunk's input and mask.

A frontend is a module with

    frontend(batch) -> (x [B, L, D], Mask of x on itself)
    frontend.reads() -> {field: (axes, dtype)} that the batch must have
    frontend.longest() -> {axis letter: longest row}; absent: no limit
    frontend.axes() -> {axis letter: the size that every batch must have}

`prefix` begins the names of fields and of the table of positions: "encoder_" in
an encoder-decoder, whose source axis is S. Parameters are those of the model itself.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.embedding import embedding
from triform.models.layers import make_norm
from triform.models.mask import Mask
from triform.models.positions import PositionEmbedding

Array = jax.Array
Batch = Mapping[str, Array]


class Tokens(nn.Module):
    """Ids of a vocabulary, embedded.

    Reads inputs [B, L] and, where they are there, segments (0: padding), positions,
    token_type_ids and global_attention_mask (1: sees all and is seen by all, past
    windows and patterns), all int32 [B, L].

    Parameters: embedding, token_type_embedding, positions/table, embedding_norm: those
    that the fields ask for.
    """

    config: TransformerConfig
    vocab_size: int
    num_types: int = 0  # 0: no embedding of token types
    position_offset: int = 0  # number of the first position
    scale: float = 1.0  # on embeddings
    stddev: float = 0.02  # of the initial table
    norm: bool = False  # after all embeddings
    causal: bool = False
    prefix: str = ""

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        trunk = self.config
        self.embedding = embedding(trunk, self.vocab_size, self.stddev)
        if self.num_types:
            self.token_type_embedding = embedding(trunk, self.num_types)
        self.table = PositionEmbedding(trunk, name=f"{self.prefix}positions")
        if self.norm:
            self.embedding_norm = make_norm(trunk, None)

    @nn.nowrap
    def reads(self) -> dict[str, tuple[str, str]]:
        """The tokens; of a source also which of them are padding."""
        if not self.prefix:
            return {"inputs": ("BL", "int32")}
        names = f"{self.prefix}inputs", f"{self.prefix}segments"
        return dict.fromkeys(names, ("BS", "int32"))

    @nn.nowrap
    def longest(self) -> dict[str, int]:
        """As many tokens as there are positions after the offset."""
        length = self.config.max_len - self.position_offset
        return {"S" if self.prefix else "L": length}

    @nn.nowrap
    def axes(self) -> dict[str, int]:
        """None is fixed."""
        return {}

    def __call__(self, batch: Batch) -> tuple[Array, Mask]:
        """(x [B, L, D], mask) of inputs [B, L]."""

        def field(name: str) -> Array | None:
            return batch.get(self.prefix + name)

        tokens, positions = field("inputs"), field("positions")
        longest = self.config.max_len - self.position_offset
        if self.position_offset and tokens.shape[1] > longest:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens exceeds {longest}, "
                "model.trunk.max_len less position_offset; raise it or shorten the data"
            )
        aligned = positions is None
        if aligned:
            positions = array_positions(tokens)
        chosen = field("global_attention_mask")
        chosen = None if chosen is None else chosen > 0
        mask = Mask.self_attention(
            positions,
            field("segments"),
            q_global=chosen,
            kv_global=chosen,
            causal=self.causal,
            aligned=aligned,
        )
        return self.embed(tokens, positions, field("token_type_ids")), mask

    def embed(
        self, tokens: Array, positions: Array, types: Array | None = None
    ) -> Array:
        """[B, L, D] of tokens [B, L] at positions [B or 1, L]; types default to 0."""
        x = self.embedding(tokens)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.num_types:
            types = jnp.zeros_like(tokens) if types is None else types
            x += self.token_type_embedding(types)
        x = self.table(x, positions + self.position_offset)
        return self.embedding_norm(x) if self.norm else x


class Patches(nn.Module):
    """Square patches of an image, after a class token if there is one.

    Dosovitskiy et al. 2021, 3.1. Reads image float32 [B, H, W, C]. The table of
    positions has the size of the grid, whatever the trunk's max_len.

    Parameters: patches, positions/table, token.
    """

    config: TransformerConfig
    image_size: int  # pixels
    patch_size: int  # pixels
    channels: int
    class_token: bool = False
    prefix: str = ""

    @nn.nowrap
    def tokens(self) -> int:
        """L: all patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    @nn.nowrap
    def reads(self) -> dict[str, tuple[str, str]]:
        """The image."""
        return {"image": ("BHWC", "float32")}

    @nn.nowrap
    def longest(self) -> dict[str, int]:
        """No row axis."""
        return {}

    @nn.nowrap
    def axes(self) -> dict[str, int]:
        """One size of images."""
        return {"H": self.image_size, "W": self.image_size, "C": self.channels}

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Array, Mask]:
        """(x [B, L, D], mask) of image [B, H, W, C]."""
        trunk, image = self.config, batch["image"]
        if image.shape[1:] != (self.image_size, self.image_size, self.channels):
            raise ValueError(
                f"model.image_size={self.image_size}, channels={self.channels}: images "
                f"of the data are {image.shape[1:]}; set them alike"
            )
        x = nn.Conv(
            trunk.d_model,
            (self.patch_size, self.patch_size),
            strides=self.patch_size,
            padding="VALID",
            dtype=jnp.dtype(trunk.dtype),
            name="patches",
        )(image)
        x = x.reshape(len(image), -1, trunk.d_model)
        if self.class_token:
            init = nn.initializers.truncated_normal(0.02)
            token = self.param("token", init, (1, 1, trunk.d_model))
            token = jnp.broadcast_to(token, (len(x), 1, trunk.d_model))
            x = jnp.concatenate([token.astype(x.dtype), x], 1)
        positions = array_positions(x)
        table = dataclasses.replace(trunk, max_len=self.tokens())
        x = PositionEmbedding(table, name=f"{self.prefix}positions")(x, positions)
        return x, Mask.self_attention(positions, aligned=True)


def array_positions(x: Array) -> Array:
    """int32 [1, L]: the positions of rows x [B, L, ...] that are one sequence each.

    One row for all: what follows from positions is then computed once.
    """
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]
