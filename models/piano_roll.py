"""Piano rolls: a decoder of frames, each key of which is on or off."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.cache import Cache
from triform.models.config import ModelConfig, TransformerConfig
from triform.models.frontends import array_positions
from triform.models.layers import dense
from triform.models.logits import head
from triform.models.mask import Mask
from triform.models.positions import PositionEmbedding
from triform.models.transformer import Stack

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class PianoRollConfig(ModelConfig):
    """A causal stack over frames, and a logit for every key of the next frame."""

    PARAMETERS: ClassVar = ((r"frame/kernel$", "keys > embed"),)

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    num_keys: int = 88  # number of piano keys

    def reads(self) -> dict[str, tuple[str, str]]:
        """Frames of zeros and ones."""
        return {"frames": ("BTM", "float32")}

    def outputs(self) -> dict[str, str]:
        """Name of an output -> name of the size of its last axis."""
        return {"frames": "num_keys"}

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return {"num_keys": self.num_keys}

    def longest(self) -> dict[str, int]:
        """Axis letter -> longest row that the model takes."""
        return {"T": self.trunk.max_len}

    def axes(self) -> dict[str, int]:
        """The keys."""
        return {"M": self.num_keys}

    def generates(self) -> bool:
        """Whether the module has `start` and `extend`."""
        return True

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require(self.num_keys >= 1, "num_keys", "must be at least 1")
        self.trunk.validate()


class PianoRoll(nn.Module):
    """{'frames': logits float32 [B, T, M] of the frame after each}.

    Boulanger-Lewandowski et al. 2012: given the frames before, keys are independent.
    Parameters: frame, positions/table, decoder, head.
    """

    config: PianoRollConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        trunk = self.config.trunk
        self.frame = dense(trunk, trunk.d_model, "frame", bias=True)
        self.positions = PositionEmbedding(trunk)
        self.decoder = Stack(trunk)
        self.head = head(trunk, self.config.num_keys, bias=True)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """See the class. Rows are padded at their ends, which nothing before sees."""
        frames = batch["frames"]
        positions = array_positions(frames)
        mask = Mask.self_attention(positions, causal=True, aligned=True)
        x, _ = self.decoder(self._embed(frames, positions), mask)
        return {"frames": self.head(x)}

    def start(
        self, batch: Mapping[str, Array], length: int
    ) -> tuple[Cache, Array, Array]:
        """Reads the frames; returns (cache with room for `length` frames, the last
        frame of each row and its position, int32 [B]): what `extend` takes first.

        Rows are frames [B, T, M], padded on the left: frame_weights [B, T] are 0 there.
        """
        frames = batch["frames"]
        real = batch["frame_weights"] > 0
        positions = jnp.where(real, jnp.cumsum(real, 1) - 1, -1).astype(jnp.int32)
        at = positions[:, -1]
        cache = Cache.empty(self.config.trunk, len(frames), frames.shape[1] + length)
        # The last frame is fed when its logits are wanted.
        _, cache = self._run(frames, positions.at[:, -1].set(-1), cache)
        return cache, frames[:, -1], at

    def extend(
        self, frames: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Feeds the next frames [B, t, M]; returns (logits [B, t, M], cache)."""
        x, cache = self._run(frames, positions, cache)
        return self.head(x), cache

    def _run(
        self, frames: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        mask = Mask.self_attention(positions, causal=True)
        return self.decoder(self._embed(frames, positions), mask, cache=cache)

    def _embed(self, frames: Array, positions: Array) -> Array:
        return self.positions(self.frame(frames), positions)
