"""Vision Transformer (Dosovitskiy et al. 2021): a config of the encoder."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np
from flax import linen as nn

from triform.models.config import POOLS, POSITION_TABLE, TransformerConfig, nonzero
from triform.models.encoder import FrontendConfig
from triform.models.frontends import Patches
from triform.models.heads import LabelHead


@dataclasses.dataclass(unsafe_hash=True)
class VisionConfig(FrontendConfig):
    """Vision Transformer: a stack over patches of a square image, and a classifier."""

    HEADS: ClassVar[tuple[str, ...]] = ("num_labels",)

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    image_size: int = 224  # height and width, in pixels; 0: taken from the data
    patch_size: int = 16  # height and width of a patch, in pixels
    channels: int = 3  # 3: RGB, 1: grey; 0: taken from the data
    pool: str = "token"  # input of the classifier: class token, or mean of patches
    num_labels: int = 1000  # number of classes; -1: taken from the data

    def frontend(self) -> Patches:
        """Patches, after a class token if that is pooled."""
        sizes = self.image_size, self.patch_size, self.channels
        return Patches(self.trunk, *sizes, class_token=self.pool == "token")

    def heads(self) -> tuple[nn.Module, ...]:
        """A linear classifier."""
        return (LabelHead(self.trunk, self.num_labels, self.pool),)

    def tokens(self) -> int:
        """Positions of the trunk: all patches, and the class token."""
        return self.frontend().tokens()

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return nonzero(self, "num_labels")

    def derive(self, shape: Mapping[str, int], classes: Mapping[str, int]) -> None:
        """Sizes that are 0 follow the images; so does a trunk's max_len of 0."""
        self.image_size = self.image_size or shape.get("H", 0)
        self.channels = self.channels or shape.get("C", 0)
        if self.patch_size > 0:
            self.trunk.max_len = self.trunk.max_len or self.tokens()
        super().derive(shape, classes)

    def adapt(
        self, name: str, saved: np.ndarray, fresh: np.ndarray
    ) -> tuple[np.ndarray, str] | None:
        """Positions of another resolution are interpolated."""
        if name != POSITION_TABLE or saved.shape[1:] != fresh.shape[1:]:
            return super().adapt(name, saved, fresh)
        values = resized_positions(np.asarray(saved), len(fresh))
        return values, f"positions interpolated from {len(saved)} to {len(fresh)}"

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
        self.trunk.validate()


def resized_positions(table: np.ndarray, size: int) -> np.ndarray:
    """A table [grid^2 (+ 1), D] for another number of positions, bilinear on the grid.

    Dosovitskiy et al. 2021, 3.2. The class token's row, if there is one, stays. Raises
    ValueError if either size is neither a square nor one more.
    """

    def split(n: int) -> tuple[int, int]:
        for extra in (0, 1):
            side = round((n - extra) ** 0.5)
            if side * side == n - extra:
                return extra, side
        raise ValueError(f"{n} positions are no square grid, with or without a token")

    (extra, old), (kept, new) = split(len(table)), split(size)
    grid = table[extra:].reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "bilinear")
    rows = [table[:1]] * extra if kept else []
    if kept and not extra:
        rows = [np.zeros_like(table[:1])]
    return np.concatenate([*rows, np.asarray(grid).reshape(new * new, -1)])
