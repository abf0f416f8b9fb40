"""The next item of a user: among all items, or beside sampled negatives.

Rows of evaluation are padded on the left: what is scored is their last position. In
training every position with a weight is.
"""

import dataclasses

import jax
import jax.numpy as jnp

from triform.runtime.metrics import Mean, Metrics
from triform.tasks import ranking
from triform.tasks.base import (
    Array,
    Batch,
    Context,
    Outputs,
    Scalars,
    Task,
    Variables,
)
from triform.tasks.prediction import CrossEntropy, PredictionConfig

LISTED = 100  # items that an answer has beside those of the longest history


@dataclasses.dataclass
class SampledItemsConfig:
    """Separate batch['targets'] from batch['negatives'] (Kang & McAuley 2018, 3.5)."""

    # In evaluation against all items, also rank the items in the user's history.
    # generate.py never recommends them.
    rank_seen: bool = True

    def validate(self) -> None:
        """There is nothing to check."""


@dataclasses.dataclass
class ItemPredictionConfig(PredictionConfig):
    """Predict batch['targets'] among all items (Sun et al. 2019, eq. 7 and 8)."""

    rank_seen: bool = True  # evaluation also ranks the items in the user's history


class Recommendation(Task):
    """Base: scores are products of states and items, and evaluation ranks them.

    hr_k, ndcg_k and mrr are those among all items; with `sampled_` in front among the
    target and the row's candidates, over the rows with candidate_weights. Ties count as
    tasks/ranking.py says.
    """

    fields: tuple[str, ...] = (
        *("inputs", "segments", "targets", "weights"),
        *("candidates", "candidate_weights"),
    )
    needs = ("states", "items")
    reports: tuple[str, ...] = (
        *("loss", *ranking.NAMES),
        *(f"sampled_{name}" for name in ranking.NAMES),
    )

    def outputs(self, variables: Variables, batch: Batch, ctx: Context) -> tuple:
        """The model's; in evaluation also `every` and `sampled`, the ranks of the last
        targets, which metrics, predictions and some losses share.
        """
        outputs, updates = super().outputs(variables, batch, ctx)
        if not ctx.train:
            every, sampled = self._ranked(outputs, batch)
            outputs = {**outputs, "every": every, "sampled": sampled}
        return outputs, updates

    def weights(self, batch: Batch) -> Scalars:
        """The number of items that are predicted."""
        return {"item": batch["weights"].sum()}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """In evaluation: by both protocols."""
        if ctx.train:
            return {}
        every, sampled = outputs["every"], outputs["sampled"]
        real = batch["weights"][:, -1]
        drawn = real * batch["candidate_weights"]
        found = {k: Mean.of(x, real) for k, x in every.metrics().items()}
        others = sampled.metrics().items()
        return found | {f"sampled_{k}": Mean.of(x, drawn) for k, x in others}

    def predict(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """loss [B] in nats, items int32 [B] (the true ones), rank and sampled_rank [B]:
        from 1, the mean of those that ties leave open.
        """
        return {
            "loss": self._last_loss(outputs, batch),
            "items": batch["targets"][:, -1],
            "rank": outputs["every"].place(),
            "sampled_rank": outputs["sampled"].place(),
        }

    def answer(self, outputs: Outputs, batch: Batch) -> dict[str, Array]:
        """candidates int32 [B, n], best first, and their shares float32 [B, n]."""
        states, items = outputs["states"][:, -1], outputs["items"]
        count = min(len(items), LISTED + batch["inputs"].shape[1])
        scores, best = ranking.best(states, items, count)
        return {"candidates": best, "shares": self._shares(states, items, scores)}

    def _ranked(
        self, outputs: Outputs, batch: Batch
    ) -> tuple[ranking.Ranked, ranking.Ranked]:
        """(among all items, among the candidates) of the last positions."""
        states, items = outputs["states"][:, -1], outputs["items"]
        own, left_out = batch["targets"][:, -1], None
        if not self.config.rank_seen:
            left_out = jnp.where(batch["segments"] > 0, batch["inputs"], -1)
        every = ranking.ranked(states, items, own, left_out)
        return every, ranking.ranked_among(states, items, own, batch["candidates"])

    def _last_loss(self, outputs: Outputs, batch: Batch) -> Array:
        """[B]: nats of the last position."""
        raise NotImplementedError

    def _shares(self, states: Array, items: Array, scores: Array) -> Array:
        """Probabilities [B, n] of items with these scores."""
        raise NotImplementedError


class SampledItems(Recommendation):
    """Binary cross-entropy of each target and its negatives, in nats per target.

    The losses of a target and of all of its negatives are added, as in the paper, where
    there is one negative.
    """

    fields = (*Recommendation.fields, "negatives")
    reports = (*Recommendation.reports, "auc")

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over targets."""
        loss = self._losses(*self._scores(outputs, batch))
        return {"item": (loss * batch["weights"]).sum()}

    def metrics(self, outputs: Outputs, batch: Batch, ctx: Context) -> Metrics:
        """Also how often a target is above a negative; ties count half."""
        own, others = self._scores(outputs, batch)
        own = own[..., None]
        right = ((own > others) + 0.5 * (own == others)).mean(-1)
        found = {"auc": Mean.of(right, batch["weights"])}
        return found | super().metrics(outputs, batch, ctx)

    def _scores(self, outputs: Outputs, batch: Batch) -> tuple[Array, Array]:
        """Of targets [B, L] and of negatives [B, L, K]."""
        ids = [batch["targets"][..., None], batch["negatives"]]
        rows = outputs["items"][jnp.concatenate(ids, -1)]
        # One product for all, or rounding would tell equal items apart.
        scores = jnp.einsum("blw,blkw->blk", outputs["states"], rows)
        return scores[..., 0], scores[..., 1:]

    def _losses(self, own: Array, others: Array) -> Array:
        return jax.nn.softplus(-own) + jax.nn.softplus(others).sum(-1)

    def _last_loss(self, outputs: Outputs, batch: Batch) -> Array:
        own, others = self._scores(outputs, batch)
        return self._losses(own[:, -1], others[:, -1])

    def _shares(self, states: Array, items: Array, scores: Array) -> Array:
        """Of each item beside a random one."""
        return jax.nn.sigmoid(scores)


class ItemPrediction(Recommendation):
    """Cross-entropy over all items, in nats per target."""

    def terms(self, outputs: Outputs, batch: Batch, ctx: Context) -> Scalars:
        """Nats, summed over targets."""
        if not ctx.train:  # rows have one target
            loss = self._last_loss(outputs, batch)
            return {"item": (loss * batch["weights"][:, -1]).sum()}
        logits = outputs["states"] @ outputs["items"].T
        loss = CrossEntropy.of(logits, batch["targets"], self.config, True).loss
        return {"item": (loss * batch["weights"]).sum()}

    def _last_loss(self, outputs: Outputs, batch: Batch) -> Array:
        return outputs["every"].log_z - outputs["every"].score

    def _shares(self, states: Array, items: Array, scores: Array) -> Array:
        """Of each item among all."""
        none = jnp.zeros(len(states), jnp.int32)
        log_z = ranking.ranked(states, items, none).log_z
        return jnp.exp(scores - log_z[:, None])
