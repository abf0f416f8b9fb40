"""Texts and pictures in one space (Radford et al. 2021): which belong together."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import ModelConfig, TransformerConfig
from triform.models.frontends import Patches, Tokens
from triform.models.heads import mean
from triform.models.layers import dense
from triform.models.transformer import Stack

Array = jax.Array

# Factor on cosines, at first and at most (Radford et al. 2021, 2.5).
FIRST_SCALE, MOST_SCALE = 1 / 0.07, 100.0


@dataclasses.dataclass(unsafe_hash=True)
class ContrastiveConfig(ModelConfig):
    """A stack over tokens and one over patches, and the width that both end in."""

    text: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    image: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    vocab_size: int = 32_000  # vocabulary size; also of a newly trained tokenizer
    image_size: int = 224  # height and width, in pixels; 0: taken from the data
    patch_size: int = 16  # height and width of a patch, in pixels
    channels: int = 3  # 3: RGB, 1: grey; 0: taken from the data
    width: int = 512  # width of the joint embedding space

    def frontends(self) -> dict[str, nn.Module]:
        """Of texts and of images."""
        sizes = self.image_size, self.patch_size, self.channels
        text = Tokens(self.text, self.vocab_size)
        return {"text": text, "image": Patches(self.image, *sizes)}

    def reads(self) -> dict[str, tuple[str, str]]:
        """Tokens, which of them are real, and the image."""
        reads = {"segments": ("BL", "int32")}
        for frontend in self.frontends().values():
            reads |= frontend.reads()
        return reads

    def outputs(self) -> dict[str, str]:
        """Unit vectors of texts and images, and the factor on their products."""
        return {"text": "", "image": "", "scale": ""}

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return {"vocab_size": self.vocab_size}

    def longest(self) -> dict[str, int]:
        """Axis letter -> longest row that the model takes."""
        return {"L": self.text.max_len}

    def axes(self) -> dict[str, int]:
        """One size of images."""
        return self.frontends()["image"].axes()

    def trunks(self) -> dict[str, TransformerConfig]:
        """Path in this config -> trunk."""
        return {"text": self.text, "image": self.image}

    def derive(self, shape: Mapping[str, int], classes: Mapping[str, int]) -> None:
        """Sizes that are 0 follow the data."""
        self.image_size = self.image_size or shape.get("H", 0)
        self.channels = self.channels or shape.get("C", 0)
        self.text.max_len = self.text.max_len or shape.get("L", 0)
        if self.patch_size > 0:
            patches = (self.image_size // self.patch_size) ** 2
            self.image.max_len = self.image.max_len or patches

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require_vocabulary()
        for name in ("image_size", "patch_size", "channels", "width"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(
            self.image_size % self.patch_size == 0,
            "patch_size",
            f"must divide image_size={self.image_size}; change one of them",
        )
        self.text.validate("model.text")
        self.image.validate("model.image")


class Tower(nn.Module):
    """A frontend, a stack, the mean over real positions, a product, length 1."""

    config: ContrastiveConfig
    of: str  # "text" or "image"

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        trunk = self.config.trunks()[self.of]
        self.frontend = self.config.frontends()[self.of]
        nn.share_scope(self, self.frontend)
        self.encoder = Stack(trunk)
        self.dense = dense(trunk, self.config.width, "dense", bias=False)

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        """float32 [B, width]."""
        x, mask = self.frontend(batch)
        x, _ = self.encoder(x, mask)
        x = self.dense(mean(x, mask.q_segments)).astype(jnp.float32)
        # Not linalg.norm: its gradient is NaN at 0, which rows of padding are.
        return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-12)


class Contrastive(nn.Module):
    """{'text', 'image': unit vectors float32 [B, width], 'scale': [1]}.

    Parameters: text_tower, image_tower, scale (its logarithm).
    """

    config: ContrastiveConfig

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """See the class."""
        config = self.config
        found = {}
        for name in config.trunks():
            found[name] = Tower(config, name, name=f"{name}_tower")(batch)
        first = nn.initializers.constant(math.log(FIRST_SCALE))
        scale = self.param("scale", first, (1,))
        return found | {"scale": jnp.minimum(jnp.exp(scale), MOST_SCALE)}
