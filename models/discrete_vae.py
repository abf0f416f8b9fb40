"""Discrete VAE of images (Ramesh et al. 2021, 2.1): pictures <-> grids of codes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.autoencoder import ConvolutionalConfig

Array = jax.Array

# Pixels of [0, 1] are moved into [EDGE, 1 - EDGE], where their logits are finite (A.3).
EDGE = 0.1
# Of log_scale: b is no less than a grey level, of 255, is wide where the logit is
# steepest. Where many pixels are exactly black their density would grow without bound.
LEAST = math.log((1 - 2 * EDGE) / 255 / (EDGE * (1 - EDGE)))


@dataclasses.dataclass(unsafe_hash=True)
class DiscreteVAEConfig(ConvolutionalConfig):
    """Square images, halved `stages` times into a grid of codes, and back."""

    PARAMETERS: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"(stem|conv_\d|skip|codes|pixels)/kernel$", "height width inputs > features"),
    )

    image_size: int = 0  # height and width, in pixels; 0: taken from the data
    channels: int = 0  # channels of an image; 0: taken from the data
    num_codes: int = 8192  # entries of the codebook
    width: int = 64  # channels at full resolution; doubled at each stage
    stages: int = 3  # how many times height and width are halved
    blocks: int = 2  # residual blocks per stage, in encoder and decoder
    noise: float = 1.0  # factor on the Gumbel noise in training
    dtype: str = "float32"  # type of activations

    def grid(self) -> int:
        """Codes a side."""
        return self.image_size // 2**self.stages

    def outputs(self) -> dict[str, str]:
        """The reconstruction, its distribution, and scores of the codes."""
        return {"image": "", "location": "", "log_scale": "", "codes": "num_codes"}

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return {"num_codes": self.num_codes}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        for name in ("width", "blocks"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(self.num_codes >= 2, "num_codes", "must be at least 2")
        self.require(self.noise >= 0, "noise", "must not be negative; 0 is off")


class Residual(nn.Module):
    """x + branch(x), of four convolutions; a 1 x 1 one on x where widths differ."""

    config: DiscreteVAEConfig
    width: int
    gain: float  # of the branch: 1 / (blocks of this side)^2 (the published code)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, c] -> [B, h, w, width]."""
        dtype, branch = jnp.dtype(self.config.dtype), x
        hidden = max(1, self.width // 4)
        for i, (width, side) in enumerate(
            ((hidden, 3), (hidden, 3), (hidden, 3), (self.width, 1))
        ):
            conv = nn.Conv(width, (side, side), dtype=dtype, name=f"conv_{i}")
            branch = conv(nn.relu(branch))
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=dtype, name="skip")(x)
        return x + self.gain * branch


class Side(nn.Module):
    """Residual blocks of one side: stage_0_block_0 ... in the order they are run."""

    config: DiscreteVAEConfig
    down: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, c] -> [B, h, w, c'] (down) or back."""
        config = self.config
        widths = [config.width * 2**i for i in range(config.stages + 1)]
        gain = 1 / (len(widths) * config.blocks) ** 2
        for i, width in enumerate(widths if self.down else reversed(widths)):
            if i and self.down:
                x = nn.max_pool(x, (2, 2), (2, 2))
            elif i:
                x = x.repeat(2, 1).repeat(2, 2)
            for j in range(config.blocks):
                x = Residual(config, width, gain, name=f"stage_{i}_block_{j}")(x)
        return nn.relu(x)


class DiscreteVAE(nn.Module):
    """{'image', 'location', 'log_scale': [B, H, W, C], 'codes': [B, h, w, K]}, float32.

    Reads image float32 [B, H, W, C] of pixels in [0, 1]. `image` is the reconstruction,
    sigmoid(location) moved back from [EDGE, 1 - EDGE]; log_scale is the logarithm of
    the logit-Laplace distribution's b; `codes` are logits. With a stream `sample` codes
    are mixed by Gumbel-softmax at `temperature`, without it the likeliest is taken.

    Parameters: stem, encoder, codes, codebook, decoder, pixels.
    """

    config: DiscreteVAEConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.stem = nn.Conv(config.width, (7, 7), dtype=dtype)
        self.encoder = Side(config, down=True)
        self.codes = nn.Conv(config.num_codes, (1, 1), dtype=dtype)
        self.codebook = nn.Embed(config.num_codes, 2 * config.width, dtype=dtype)
        self.decoder = Side(config, down=False)
        self.pixels = nn.Conv(2 * config.channels, (1, 1), dtype=dtype)

    def __call__(
        self, batch: Mapping[str, Array], temperature: Array | float = 1.0
    ) -> dict[str, Array]:
        """See the class."""
        logits = self._logits(batch["image"])
        if self.has_rng("sample") and not self.is_initializing():
            noise = jax.random.gumbel(self.make_rng("sample"), logits.shape)
            mixed = jax.nn.softmax((logits + self.config.noise * noise) / temperature)
            x = mixed.astype(self.codebook.dtype) @ self.codebook.embedding
        else:
            x = self.codebook(logits.argmax(-1))
        return self._pictures(x) | {"codes": logits}

    def encode(self, image: Array) -> Array:
        """The likeliest codes int32 [B, h, w] of images float32 [B, H, W, C]."""
        return self._logits(image).argmax(-1).astype(jnp.int32)

    def decode(self, codes: Array) -> Array:
        """Images float32 [B, H, W, C] in [0, 1] of codes int32 [B, h, w]."""
        return self._pictures(self.codebook(codes))["image"]

    def _logits(self, image: Array) -> Array:
        x = inside(image).astype(self.stem.dtype)
        return self.codes(self.encoder(self.stem(x))).astype(jnp.float32)

    def _pictures(self, x: Array) -> dict[str, Array]:
        x = self.pixels(self.decoder(x)).astype(jnp.float32)
        location, log_scale = jnp.split(x, 2, -1)
        log_scale = jnp.maximum(log_scale, LEAST)
        image = (jax.nn.sigmoid(location) - EDGE) / (1 - 2 * EDGE)
        return {"image": image, "location": location, "log_scale": log_scale}


def inside(pixels: Array) -> Array:
    """Pixels of [0, 1] in [EDGE, 1 - EDGE]."""
    return pixels * (1 - 2 * EDGE) + EDGE
