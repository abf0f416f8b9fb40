"""Images through codes and back: the discrete VAE's objective (Ramesh et al. 2021)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from triform.runtime.metrics import Mean, Metrics
from triform.tasks.base import Array, Batch, Context, Outputs, Scalars, Task
from triform.tasks.code_use import CodesUsed, UsePerplexity, histogram

EDGE = 0.1  # pixels lie in [EDGE, 1 - EDGE] before their logit is taken (A.3)
RECONSTRUCTIONS = ("laplace", "squared")


@dataclasses.dataclass
class ImageCodingConfig:
    """Predict batch['image'] from its codes, whose distributions stay near uniform.

    Minimised is the mean loss per pixel and channel, plus kl_weight / numbers_per_code
    times the mean divergence per code. That is the paper's objective, which divides
    reconstruction and 6.6 KL by 256 x 256 x 3 numbers, where 32 x 32 codes have 192
    numbers each. A code of fewer numbers costs the same beside a pixel's loss: with
    its own number in place of 192 a code of 4 pixels would cost 48 times as much.
    """

    # laplace: logit-Laplace loss of pixels (A.3); squared: error / (2 spread^2).
    reconstruction: str = "laplace"
    spread: float = 0.25  # squared: about the standard deviation of pixels
    kl_weight: float = 6.6  # weight of the KL divergence, as in the paper
    kl_steps: int = 5000  # steps over which kl_weight grows from 0 (cosine)
    numbers_per_code: int = 192  # numbers per code for which kl_weight was chosen
    temperature: float = 1.0  # first temperature of Gumbel-softmax
    last_temperature: float = 0.0625  # final temperature
    temperature_steps: int = 150_000  # steps from the first to the final one (cosine)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""

        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"task.{name}={getattr(self, name)!r}: {rule}")

        choices = f"expected one of {', '.join(RECONSTRUCTIONS)}"
        require(self.reconstruction in RECONSTRUCTIONS, "reconstruction", choices)
        for name in ("kl_weight", "kl_steps", "temperature_steps"):
            require(getattr(self, name) >= 0, name, "must not be negative; 0 is off")
        for name in ("numbers_per_code", "spread", "temperature", "last_temperature"):
            require(getattr(self, name) > 0, name, "must be positive")


class ImageCoding(Task):
    """Loss per number of a real image, plus the divergence of its codes from uniform.

    `squared_error` is per number of pixels in [0, 1]; `perplexity` and `used` say how
    many of the codebook's entries the likeliest codes take.
    """

    fields = ("image", "image_weights")
    needs = ("image", "location", "log_scale", "codes")
    reports = (
        *("loss", "reconstruction_loss", "kl_loss"),
        *("squared_error", "perplexity", "used"),
    )

    def outputs(self, variables, batch: Batch, ctx: Context) -> tuple:
        """The model's, at the temperature of the step."""
        outputs, _ = self.model.apply(
            variables,
            batch,
            self.temperature(ctx.step),
            rngs=dict(ctx.rngs),
            mutable=["losses"],
        )
        return outputs, {k: x for k, x in variables.items() if k != "params"}

    def temperature(self, step: Array) -> Array:
        """Of Gumbel-softmax at a step."""
        config = self.config
        share = cosine(step, config.temperature_steps)
        first, last = config.temperature, config.last_temperature
        return first + (last - first) * share

    def weights(self, batch: Batch) -> Scalars:
        """Pixels (of every channel) of real images, and real images."""
        images = batch["image_weights"].sum()
        numbers = math.prod(batch["image"].shape[1:])
        return {"reconstruction": images * numbers, "kl": images}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Losses summed over numbers, and over images the mean divergence of a code."""
        weights, logits = batch["image_weights"], outputs["codes"]
        log_q = jax.nn.log_softmax(logits)
        kl = (jnp.exp(log_q) * log_q).sum(-1) + math.log(logits.shape[-1])
        rows = {
            "reconstruction": self._losses(outputs, batch).sum((1, 2, 3)),
            "kl": kl.mean((1, 2)),
        }
        return {k: (x * weights).sum() for k, x in rows.items()}

    def coefficients(self, step: Array | int) -> Scalars:
        """The divergence's factor, which rises over the first steps."""
        config = self.config
        factor = config.kl_weight / config.numbers_per_code
        return {"kl": factor * cosine(jnp.asarray(step), config.kl_steps)}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Squared error, and how codes are used."""
        weights, logits = batch["image_weights"], outputs["codes"]
        error = (outputs["image"] - batch["image"]) ** 2
        counts = histogram(logits.argmax(-1), weights, logits.shape[-1])
        return {
            "squared_error": Mean.of(error.mean((1, 2, 3)), weights),
            "perplexity": UsePerplexity(counts, counts.sum()),
            "used": CodesUsed(counts, counts.sum()),
        }

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] per number, image [B, H, W, C], codes int32 [B, h, w]."""
        return {
            "loss": self._losses(outputs, batch).mean((1, 2, 3)),
            "image": outputs["image"],
            "codes": outputs["codes"].argmax(-1).astype(jnp.int32),
        }

    def answer(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """image [B, H, W, C]: what comes back of a picture."""
        return {"image": outputs["image"]}

    def _losses(self, outputs: Outputs, batch: Batch) -> Array:
        """[B, H, W, C]: nats of a logit-Laplace distribution, or of a Gaussian less a
        constant.
        """
        if self.config.reconstruction == "squared":
            error = outputs["image"] - batch["image"]
            return (error / self.config.spread) ** 2 / 2
        x = batch["image"] * (1 - 2 * EDGE) + EDGE
        logit = jnp.log(x) - jnp.log1p(-x)
        log_scale = outputs["log_scale"]
        far = jnp.abs(logit - outputs["location"]) * jnp.exp(-log_scale)
        return far + log_scale + math.log(2) + jnp.log(x) + jnp.log1p(-x)


def cosine(step: Array, steps: int) -> Array:
    """From 0 to 1 over `steps`, along half a cosine; 1 at once if there are none."""
    share = jnp.minimum((step + 1) / max(1, steps), 1.0)
    return (1 - jnp.cos(jnp.pi * share)) / 2
