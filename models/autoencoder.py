"""A convolutional autoencoder of images."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import DTYPES, ModelConfig, TransformerConfig

Array = jax.Array


class ConvolutionalConfig(ModelConfig):
    """What models of square images share whose stages halve height and width."""

    image_size: int  # pixels; 0 follows the data
    channels: int  # of an image; 0 follows the data
    stages: int  # how many times height and width are halved
    dtype: str  # of activations

    def reads(self) -> dict[str, tuple[str, str]]:
        """The image."""
        return {"image": ("BHWC", "float32")}

    def longest(self) -> dict[str, int]:
        """No row axis."""
        return {}

    def axes(self) -> dict[str, int]:
        """One size of images."""
        return {"H": self.image_size, "W": self.image_size, "C": self.channels}

    def trunks(self) -> dict[str, TransformerConfig]:
        """None."""
        return {}

    def derive(self, shape: Mapping[str, int], classes: Mapping[str, int]) -> None:
        """Sizes that are 0 follow the images."""
        self.image_size = self.image_size or shape.get("H", 0)
        self.channels = self.channels or shape.get("C", 0)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        for name in ("image_size", "channels", "stages"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(
            self.image_size % 2**self.stages == 0,
            "stages",
            f"2**stages must divide image_size={self.image_size}; change one of them",
        )
        rule = f"expected one of {', '.join(DTYPES)}"
        self.require(self.dtype in DTYPES, "dtype", rule)


@dataclasses.dataclass(unsafe_hash=True)
class AutoencoderConfig(ConvolutionalConfig):
    """Square images, halved `stages` times, and back."""

    PARAMETERS: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"(up_|down_)\d+/kernel$", "height width channels > features"),
        (r"(latent|pixels)/kernel$", "height width channels > features"),
    )

    image_size: int = 0  # height and width, in pixels; 0: taken from the data
    channels: int = 0  # channels of an image; 0: taken from the data
    width: int = 32  # channels of the first stage; doubled at each next stage
    stages: int = 2  # how many times height and width are halved
    latent: int = 4  # channels of the latent image
    dtype: str = "float32"  # type of activations

    def outputs(self) -> dict[str, str]:
        """The reconstruction and the latent image: neither has classes."""
        return {"image": "", "latent": ""}

    def sizes(self) -> dict[str, int]:
        """None."""
        return {}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        for name in ("width", "latent"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")


class Autoencoder(nn.Module):
    """{'image': [B, H, W, C], 'latent': [B, h, w, channels]}, float32.

    Reads image float32 [B, H, W, C]; h = H / 2**stages. Parameters: down_0, down_1 ...
    (from the image on), latent, up_0, up_1 ... (from the latent image on), pixels.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """See the class."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        widths = [config.width * 2**i for i in range(config.stages)]
        square = (3, 3)
        x = batch["image"]
        for i, width in enumerate(widths):
            x = nn.relu(nn.Conv(width, square, 2, dtype=dtype, name=f"down_{i}")(x))
        latent = nn.Conv(config.latent, square, dtype=dtype, name="latent")(x)
        x = latent
        for i, width in enumerate(reversed(widths)):
            up = nn.ConvTranspose(width, square, (2, 2), dtype=dtype, name=f"up_{i}")
            x = nn.relu(up(x))
        x = nn.Conv(config.channels, square, dtype=dtype, name="pixels")(x)
        return {k: v.astype(jnp.float32) for k, v in (("image", x), ("latent", latent))}
