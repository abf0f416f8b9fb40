"""Which text belongs to which picture (Radford et al. 2021, 2.3)."""

import dataclasses

import jax
import jax.numpy as jnp

from triform.runtime.metrics import Mean, Metrics
from triform.tasks.base import Batch, Context, Outputs, Scalars, Task

Array = jax.Array
NOWHERE = -1e9  # score of what is padding
# Term -> (output that chooses, output among whose rows it chooses).
TERMS = {"text": ("text", "image"), "image": ("image", "text")}


@dataclasses.dataclass
class MatchingConfig:
    """Find every row's partner among those of the whole batch, from either side."""

    text_share: float = 0.5  # weight of the loss that finds the image of a text
    image_share: float = 0.5  # weight of the loss that finds the text of an image

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        for name in ("text_share", "image_share"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"task.{name}={getattr(self, name)}: must not be negative; 0 "
                    "switches the term off"
                )


class Matching(Task):
    """Symmetric cross-entropy over the rows of all devices (InfoNCE), nats per row.

    Every row is compared with those of its batch, so that another size of batch is
    another objective. Equal captions in a batch are each other's mistakes.
    """

    fields, needs = ("row_weights",), ("text", "image", "scale")
    reports = ("loss", "text_loss", "image_loss", "text_accuracy", "image_accuracy")
    couples_rows = True

    def weights(self, batch: Batch) -> Scalars:
        """Real rows, twice."""
        return dict.fromkeys(TERMS, batch["row_weights"].sum())

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over rows."""
        found = {}
        for term in TERMS:
            own, others = _scores(term, outputs, batch, ctx)
            loss = jax.nn.logsumexp(others, -1) - own
            found[term] = (loss * batch["row_weights"]).sum()
        return found

    def coefficients(self, step: Array | int) -> Scalars:
        """The shares."""
        return {"text": self.config.text_share, "image": self.config.image_share}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """How often the partner has the highest score; ties share it."""
        found = {}
        for term in TERMS:
            own, others = _scores(term, outputs, batch, ctx)
            peak = others.max(-1)
            ties = (others >= peak[:, None]).sum(-1)
            right = (own >= peak - 1e-6) / ties
            found[f"{term}_accuracy"] = Mean.of(right, batch["row_weights"])
        return found

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """match [B]: the score of every pair."""
        products = (outputs["text"] * outputs["image"]).sum(-1)
        return {"match": products * outputs["scale"]}


def _scores(
    term: str, outputs: Outputs, batch: Batch, ctx: Context
) -> tuple[Array, Array]:
    """(score of every row's own partner [b], of those of all rows [b, B])."""
    chooses, among = (outputs[name] for name in TERMS[term])
    scale = outputs["scale"]
    real = ctx.all_rows(batch["row_weights"]) > 0
    others = scale * chooses @ ctx.all_rows(among).T
    own = scale * (chooses * among).sum(-1)
    return own, jnp.where(real, others, NOWHERE)
