"""Images through a bottleneck and back, by least squares."""

import dataclasses
import math

import jax.numpy as jnp

from triform.tasks.base import Array, Batch, Context, Outputs, Scalars, Task


@dataclasses.dataclass
class AutoencodingConfig:
    """Predict batch['image'] from itself; latent images are to be sparse."""

    latent_penalty: float = 0.0  # weight of sum |latent| of a row in the loss; 0: off
    warmup_steps: int = 0  # steps over which latent_penalty grows from 0

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        for name in ("latent_penalty", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"task.{name}={getattr(self, name)}: must not be negative; 0 "
                    "switches it off"
                )


class Autoencoding(Task):
    """Squared error per real pixel, plus the penalty per real image."""

    fields, needs = ("image", "image_weights"), ("image", "latent")
    reports = ("loss", "reconstruction_loss", "latent_loss")

    def weights(self, batch: Batch) -> Scalars:
        """Pixels (of every channel) of real images, and real images."""
        images = batch["image_weights"].sum()
        pixels = math.prod(batch["image"].shape[1:])
        return {"reconstruction": images * pixels, "latent": images}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Squared errors summed over pixels, |latent| over latent images."""
        rows = {
            "reconstruction": self._squared(outputs, batch),
            "latent": jnp.abs(outputs["latent"]),
        }
        weights = batch["image_weights"]
        return {k: (x.sum((1, 2, 3)) * weights).sum() for k, x in rows.items()}

    def coefficients(self, step: Array | int) -> Scalars:
        """The penalty's factor, which grows over the first steps."""
        share = jnp.minimum((step + 1) / max(1, self.config.warmup_steps), 1.0)
        return {"latent": self.config.latent_penalty * share}

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] (squared error per pixel), image [B, H, W, C]."""
        loss = self._squared(outputs, batch).mean((1, 2, 3))
        return {"loss": loss, "image": outputs["image"]}

    def _squared(self, outputs: Outputs, batch: Batch) -> Array:
        return (outputs["image"] - batch["image"]) ** 2
