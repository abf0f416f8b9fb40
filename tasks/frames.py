"""Piano rolls frame by frame: which keys sound next."""

import dataclasses

import jax
import jax.numpy as jnp

from triform.runtime.metrics import Mean, Metrics
from triform.tasks.base import Array, Batch, Context, Outputs, Scalars, Task, row_mean


@dataclasses.dataclass
class FramePredictionConfig:
    """Predict the keys of batch['frames'] from the frames before."""

    def validate(self) -> None:
        """There is nothing to check."""


class FramePrediction(Task):
    """Nats per frame, summed over its keys, which are on or off.

    The protocol of Boulanger-Lewandowski et al. 2012 and Bai et al. 2018: the first
    frame of a piece is not scored, and all others count alike, whatever their piece.
    `accuracy` is theirs, too: hits / (hits + false alarms + misses) of keys that are
    likelier on than off.
    """

    fields, needs = ("frames", "frame_weights"), ("frames",)
    reports = ("loss", "accuracy")

    def weights(self, batch: Batch) -> Scalars:
        """The frames that are scored."""
        return {"frame": _targets(batch)[1].sum()}

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over keys and frames."""
        return {"frame": (self._nats(outputs, batch) * _targets(batch)[1]).sum()}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Accuracy of the keys that sound."""
        true, weights = _targets(batch)
        on = (outputs["frames"][:, :-1] > 0).astype(jnp.float32)
        hits = (on * true).sum(-1)
        concerned = on.sum(-1) + true.sum(-1) - hits
        return {"accuracy": Mean((hits * weights).sum(), (concerned * weights).sum())}

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] in nats per frame."""
        return {"loss": row_mean(self._nats(outputs, batch), _targets(batch)[1])}

    def _nats(self, outputs: Outputs, batch: Batch) -> Array:
        """float32 [B, T - 1] of the frames after the first."""
        logits, true = outputs["frames"][:, :-1], _targets(batch)[0]
        # -log sigmoid of the logit where a key is on, of its negative where it is off.
        return jax.nn.softplus(jnp.where(true > 0, -logits, logits)).sum(-1)


def _targets(batch: Batch) -> tuple[Array, Array]:
    """(frames [B, T - 1, M] that are predicted, their weights)."""
    return batch["frames"][:, 1:], batch["frame_weights"][:, 1:]
