"""DALL-E (Ramesh et al. 2021): a decoder of texts and codes of pictures."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from triform.models.cache import Cache
from triform.models.config import ModelConfig, TransformerConfig
from triform.models.embedding import embedding
from triform.models.logits import head, whole
from triform.models.mask import Mask
from triform.models.patterns import on_grid
from triform.models.positions import POSITIONS
from triform.models.transformer import Stack

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class TextToImageConfig(ModelConfig):
    """A causal stack over text_len positions of text and grid^2 codes.

    Patterns of a grid ("row", "column", "conv:5") get text and grid from here.
    """

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 16_384  # vocabulary size of the text
    num_codes: int = 8192  # size of the image codebook; -1: taken from the data
    text_len: int = 0  # text positions, with the start token; 0: taken from the data
    grid: int = 0  # codes per side of an image; 0: taken from the data

    def reads(self) -> dict[str, tuple[str, str]]:
        """Texts, which of their positions are real, and codes row by row."""
        texts = dict.fromkeys(("text", "text_segments"), ("BS", "int32"))
        return texts | {"codes": ("BL", "int32")}

    def outputs(self) -> dict[str, str]:
        """Name of an output -> name of the size of its last axis."""
        return {"text": "vocab_size", "codes": "num_codes"}

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return {"vocab_size": self.vocab_size, "num_codes": self.num_codes}

    def longest(self) -> dict[str, int]:
        """No limit: both lengths are fixed."""
        return {}

    def axes(self) -> dict[str, int]:
        """Both lengths."""
        return {"S": self.text_len, "L": self.grid**2}

    def derive(self, shape: Mapping[str, int], classes: Mapping[str, int]) -> None:
        """Lengths that are 0 follow the data, and patterns of a grid both lengths."""
        self.text_len = self.text_len or shape.get("S", 0)
        self.grid = self.grid or math.isqrt(shape.get("L", 0))
        self.trunk.max_len = self.trunk.max_len or self.text_len + self.grid**2
        self.trunk.patterns = tuple(
            on_grid(x, self.text_len, self.grid) for x in self.trunk.patterns
        )
        super().derive(shape, classes)

    def generates(self) -> bool:
        """Whether the module has `start` and `extend`."""
        return True

    def adapt(
        self, name: str, saved: np.ndarray, fresh: np.ndarray
    ) -> tuple[np.ndarray, str] | None:
        """The table of ids has three parts: of another shape it means nothing."""
        return None if name == TABLE else super().adapt(name, saved, fresh)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require_vocabulary()
        for name in ("text_len", "grid"):
            self.require(getattr(self, name) >= 0, name, "must not be negative")
        self.require(self.num_codes >= 2, "num_codes", "must be at least 2")
        self.require(self.text_len >= 2, "text_len", "must be at least 2")
        self.require(self.grid >= 1, "grid", "must be at least 1")
        self.trunk.validate()
        scheme = POSITIONS.get(self.trunk.positions)
        self.require(
            scheme is None or scheme.embed is None,
            "trunk",
            f"positions={self.trunk.positions!r}: text, rows and columns have tables "
            "of their own; set model.trunk.positions=none, rotary or relative",
        )


TABLE = "embedding/embedding"


class TextToImage(nn.Module):
    """{'text': [B, S - 1, V], 'codes': [B, L, K]}: float32 logits of what comes next.

    A row is S positions of text, the first of them the start, and L of codes. Logits
    of text at i are of position i + 1, those of codes at i of code i. Positions without
    text (segment 0) hold a learned filler each (Ramesh et al. 2021, 2.2).

    One table holds V texts' ids, S fillers and K codes. Parameters: embedding,
    text_positions, row_positions, column_positions, decoder, text_head, code_head.
    """

    config: TextToImageConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        config, trunk = self.config, self.config.trunk
        self.embedding = embedding(trunk, self.first_code + config.num_codes)
        self.text_positions = Table(trunk, config.text_len)
        self.row_positions = Table(trunk, config.grid)
        self.column_positions = Table(trunk, config.grid)
        self.decoder = Stack(trunk)
        chunks = trunk.logit_chunks
        self.text_head = head(trunk, config.vocab_size, chunks=chunks)
        self.code_head = head(trunk, config.num_codes, chunks=chunks)

    @property
    def first_code(self) -> int:
        """Row of the table where codes begin."""
        return self.config.vocab_size + self.config.text_len

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """See the class."""
        texts = self._texts(batch)
        length = texts.shape[1]
        ids = jnp.concatenate([texts, batch["codes"]], 1)
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        x = self._embed(ids, positions)
        mask = Mask.self_attention(positions, causal=True, aligned=True)
        x, _ = self.decoder(x, mask)
        # Nothing follows the last code.
        text, codes = x[:, : length - 1], x[:, length - 1 : -1]
        return {"text": self.text_head(text), "codes": self.code_head(codes)}

    def start(
        self, batch: Mapping[str, Array], kept: int = 0
    ) -> tuple[Cache, Array, Array]:
        """Reads the texts and their first `kept` codes; returns (cache with room for
        all codes, what to feed first and its position, int32 [B]): see `extend`.
        """
        texts = self._texts(batch)
        ids = jnp.concatenate([texts, batch["codes"][:, :kept]], 1)
        rows, length = ids.shape
        room = texts.shape[1] + self.config.grid**2
        cache = Cache.empty(self.config.trunk, rows, room)
        positions = jnp.broadcast_to(
            jnp.arange(length - 1, dtype=jnp.int32), (rows, length - 1)
        )
        _, cache = self._run(ids[:, :-1], positions, cache)
        return cache, ids[:, -1], jnp.full((rows,), length - 1, jnp.int32)

    def extend(self, ids: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Feeds the next ids int32 [B, l]; returns (logits of codes [B, l, K], cache).

        They are codes, or before the codes rows of the table.
        """
        x, cache = self._run(ids, positions, cache)
        return whole(self.code_head(x)), cache

    def _run(self, ids: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        mask = Mask.self_attention(positions, causal=True)
        return self.decoder(self._embed(ids, positions), mask, cache=cache)

    def _texts(self, batch: Mapping[str, Array]) -> Array:
        """Rows of the table, int32 [B, S], with fillers where there is no text."""
        texts = batch["text"]
        fillers = self.config.vocab_size + jnp.arange(texts.shape[1], dtype=jnp.int32)
        return jnp.where(batch["text_segments"] > 0, texts, fillers)

    def _embed(self, ids: Array, positions: Array) -> Array:
        """[B, L, D] of codes, or rows of the table, at positions [B or 1, L]."""
        config = self.config
        index = positions - config.text_len  # among the codes; negative: text
        is_text = index < 0
        x = self.embedding(jnp.where(is_text, ids, ids + self.first_code))
        row, column = jnp.divmod(jnp.maximum(index, 0), config.grid)
        of_codes = self.row_positions(row) + self.column_positions(column)
        of_text = self.text_positions(positions)
        return x + jnp.where(is_text[..., None], of_text, of_codes)


class Table(nn.Module):
    """Learned positions: a table of `size` of them."""

    config: TransformerConfig
    size: int

    @nn.compact
    def __call__(self, positions: Array) -> Array:
        """[B, L, D] of positions [B, L]; those outside get the nearest."""
        init, dtype = nn.initializers.normal(0.02), jnp.dtype(self.config.dtype)
        table = nn.Embed(
            num_embeddings=self.size,
            features=self.config.d_model,
            dtype=dtype,
            embedding_init=init,
            name="table",
        )
        return table(jnp.clip(positions, 0, self.size - 1))
