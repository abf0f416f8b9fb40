"""Vision Transformer (Dosovitskiy et al. 2021)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from triform.models.config import POOLS, ModelConfig, TransformerConfig
from triform.models.embedding import head
from triform.models.mask import Mask
from triform.models.positions import PositionEmbedding
from triform.models.transformer import Stack

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class VisionConfig(ModelConfig):
    """A bidirectional stack over patches of a square image, and a classifier."""

    reads = ("image",)

    trunk: TransformerConfig = dataclasses.field(
        default_factory=lambda: TransformerConfig(max_len=197)
    )
    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    channels: int = 3
    pool: str = "token"  # what is classified: a class token, or the patches' mean
    num_labels: int = 1000

    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    def tokens(self) -> int:
        """Places of the trunk: all patches, after the class token if there is one."""
        return self.grid() ** 2 + (self.pool == "token")

    def limits(self) -> dict[str, int]:
        """How many ids each key of a batch may hold."""
        return {"label": self.num_labels}

    def adapt(self, name: str, saved: Any, shape: tuple[int, ...]) -> Any | None:
        """Positions of another resolution."""
        if name != "positions/table/embedding" or saved.shape[1:] != shape[1:]:
            return None
        return resized_positions(np.asarray(saved), shape[0])

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        for name in ("image_size", "patch_size", "channels", "num_labels"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        rule = f"expected one of {', '.join(POOLS)}"
        self.require(self.pool in POOLS, "pool", rule)
        self.require(
            self.image_size % self.patch_size == 0,
            "patch_size",
            f"must divide image_size={self.image_size}; change one of them",
        )
        if self.trunk.max_len != self.tokens():
            raise ValueError(
                f"model.trunk.max_len={self.trunk.max_len}: must be the number of "
                f"patches and the class token; set it to {self.tokens()}"
            )
        self.trunk.validate()


class Vision(nn.Module):
    """Images in, logits of their class out."""

    config: VisionConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        cfg, trunk = self.config, self.config.trunk
        self.patches = nn.Conv(
            trunk.d_model,
            (cfg.patch_size, cfg.patch_size),
            strides=cfg.patch_size,
            padding="VALID",
            dtype=jnp.dtype(trunk.dtype),
        )
        if cfg.pool == "token":
            self.token = self.param(
                "token", nn.initializers.truncated_normal(0.02), (1, 1, trunk.d_model)
            )
        self.positions = PositionEmbedding(trunk)
        self.encoder = Stack(trunk)
        self.label_head = head(trunk, cfg.num_labels, bias=True)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'label': float32 [B, num_labels]} of image float32 [B, h, w, channels]."""
        cfg, image = self.config, batch["image"]
        if image.shape[1:] != (cfg.image_size, cfg.image_size, cfg.channels):
            raise ValueError(
                f"model.image_size={cfg.image_size}, channels={cfg.channels}: images "
                f"of the data are {image.shape[1:]}; set them alike"
            )
        x = self.patches(image)
        x = x.reshape(len(image), -1, cfg.trunk.d_model)
        if cfg.pool == "token":
            token = jnp.broadcast_to(self.token, (len(x), 1, cfg.trunk.d_model))
            x = jnp.concatenate([token.astype(x.dtype), x], 1)
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        x = self.positions(x, positions)
        x, _ = self.encoder(x, Mask.self_attention(positions, aligned=True))
        x = x[:, 0] if cfg.pool == "token" else x.mean(1)
        return {"label": self.label_head(x)}


def resized_positions(table: np.ndarray, size: int) -> np.ndarray:
    """A table [grid^2 (+ 1), D] for another number of places, bilinear on the grid.

    Dosovitskiy et al. 2021, 3.2. The class token's row, if there is one, stays. Raises
    ValueError if either size is no square, nor one above a square.
    """

    def split(n: int) -> tuple[int, int]:
        for extra in (0, 1):
            side = round((n - extra) ** 0.5)
            if side * side == n - extra:
                return extra, side
        raise ValueError(f"{n} places are no square grid, with or without a token")

    (extra, old), (kept, new) = split(len(table)), split(size)
    grid = table[extra:].reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "bilinear")
    rows = [table[:1]] * extra if kept else []
    if kept and not extra:
        rows = [np.zeros_like(table[:1])]
    return np.concatenate([*rows, np.asarray(grid).reshape(new * new, -1)])
