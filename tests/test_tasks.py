"""Token prediction against explicit NumPy formulas."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from triform import models, tasks
from triform.runtime.metrics import CalibrationError, values
from triform.tasks import TokenPrediction, TokenPredictionConfig

ROWS, LENGTH, VOCAB = 3, 5, 7


class Logits:
    """A model whose parameters are its logits."""

    def apply(self, variables, batch, rngs):
        return {"targets": variables["params"]}


def example(seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((ROWS, LENGTH, VOCAB)).astype(np.float32)
    batch = {
        "targets": rng.integers(0, VOCAB, (ROWS, LENGTH)),
        "weights": rng.choice([0.0, 0.5, 1.0], (ROWS, LENGTH)).astype(np.float32),
    }
    return logits, batch


def measure(logits, batch, train, **options):
    """(loss, {name: value}) on the host."""
    task = TokenPrediction(TokenPredictionConfig(**options), Logits())
    loss, measured = task.loss(logits, batch, jax.random.key(0), train)
    return loss.value(), {k: m.value() for k, m in measured.items()}


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def average(x, weights):
    return (x * weights).sum() / weights.sum()


def test_evaluation_is_plain_cross_entropy():
    logits, batch = example()
    options = {"label_smoothing": 0.3, "z_loss": 0.1}  # both in training only
    loss, measured = measure(logits, batch, False, **options)
    nll = -np.take_along_axis(log_softmax(logits), batch["targets"][..., None], -1)[
        ..., 0
    ]
    expected = average(nll, batch["weights"])
    assert loss == measured["loss"] == pytest.approx(expected, rel=1e-6)
    assert measured["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    right = logits.argmax(-1) == batch["targets"]
    assert measured["accuracy"] == pytest.approx(average(right, batch["weights"]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_label_smoothing_and_z_loss(smoothing, z_loss):
    logits, batch = example()
    loss, measured = measure(
        logits, batch, True, label_smoothing=smoothing, z_loss=z_loss
    )
    # Szegedy et al. 2016, 7: the target keeps 1 - e, all share e alike.
    q = (1 - smoothing) * np.eye(VOCAB)[batch["targets"]] + smoothing / VOCAB
    terms = -(q * log_softmax(logits)).sum(-1)
    terms += z_loss * np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2
    expected = average(terms, batch["weights"])
    assert loss == pytest.approx(expected, rel=1e-6)
    # What is reported besides the loss is without the additions.
    plain = measure(logits, batch, False)[1]
    for name in ("perplexity", "accuracy"):
        assert measured[name] == pytest.approx(plain[name], rel=1e-6)


def test_the_gradient_is_optax_on_smoothed_labels():
    logits, batch = example()
    task = TokenPrediction(TokenPredictionConfig(label_smoothing=0.2), Logits())

    def ours(logits):
        return task.loss(logits, batch, None, True)[0].total

    def theirs(logits):
        labels = optax.smooth_labels(jax.nn.one_hot(batch["targets"], VOCAB), 0.2)
        return (optax.softmax_cross_entropy(logits, labels) * batch["weights"]).sum()

    np.testing.assert_allclose(
        jax.grad(ours)(logits), jax.grad(theirs)(logits), atol=1e-6
    )


@pytest.mark.parametrize("train", [True, False])
def test_what_weighs_nothing_changes_nothing(train):
    logits, batch = example()
    nothing = batch["weights"] == 0
    assert nothing.any()
    other = np.where(nothing[..., None], 50 * logits[::-1], logits)
    targets = np.where(nothing, VOCAB - 1 - batch["targets"], batch["targets"])
    expected = measure(logits, batch, train, z_loss=0.1)
    assert measure(other, batch | {"targets": targets}, train, z_loss=0.1) == expected


def test_weights_count_as_repetitions():
    logits, batch = example()
    batch["weights"] = np.ones((ROWS, LENGTH), np.float32)
    batch["weights"][0] = 2
    twice = {k: np.concatenate([x, x[:1]]) for k, x in batch.items()}
    twice["weights"][:] = 1
    expected = measure(np.concatenate([logits, logits[:1]]), twice, False)[1]
    assert measure(logits, batch, False)[1] == pytest.approx(expected, rel=1e-5)


def test_logits_of_any_size_are_finite():
    logits, batch = example()
    for train in (True, False):
        loss, measured = measure(1e4 * logits, batch, train)
        assert np.isfinite(loss)
        assert 0 <= measured["accuracy"] <= 1


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_loop_over_bins(bins):
    rng = np.random.default_rng(0)
    confidence = rng.random(200).astype(np.float32)
    confidence[:2] = 0.0, 1.0
    correct = rng.integers(0, 2, 200).astype(np.float32)
    weights = rng.choice([0.0, 1.0, 2.0], 200).astype(np.float32)
    expected = 0.0
    for b in range(bins):
        of_bin = [min(int(c * bins), bins - 1) == b for c in confidence]
        w = weights[of_bin]
        if w.sum():
            gap = average(confidence[of_bin], w) - average(correct[of_bin], w)
            expected += w.sum() / weights.sum() * abs(gap)
    got = CalibrationError.of(confidence, correct, weights, bins).value()
    assert got == pytest.approx(expected, abs=1e-6)


def test_calibration_of_a_task():
    logits, batch = example()
    top = np.exp(log_softmax(logits)).max(-1)
    right = (logits.argmax(-1) == batch["targets"]).astype(np.float32)
    expected = CalibrationError.of(top, right, batch["weights"]).value()
    assert measure(logits, batch, False)[1]["ece"] == pytest.approx(expected, abs=1e-6)
    assert "ece" not in measure(logits, batch, True)[1]


def test_a_bfloat16_trunk_gives_nearly_the_float32_loss(tiny_config, pair_batch):
    batch = pair_batch([4, 3], [4, 2], 4)
    found, params = {}, None
    for dtype in ("float32", "bfloat16"):
        task = tasks.build(
            TokenPredictionConfig(), models.build(tiny_config(dtype=dtype))
        )
        if params is None:
            params = jax.jit(task.init)(jax.random.key(0), batch)

        def loss(params, task=task):
            mean, _ = task.loss(params, batch, None, False)
            return mean.total / mean.weight

        found[dtype] = jax.jit(jax.value_and_grad(loss))(params)
        assert {x.dtype for x in jax.tree.leaves(found[dtype])} == {np.dtype("f4")}
    (exact, exact_grads), (rough, rough_grads) = found["float32"], found["bfloat16"]
    # A bfloat16 has 8 bits of precision; a dozen roundings follow one another.
    assert exact != rough
    assert rough == pytest.approx(exact, rel=12 * 2**-8)
    size = optax.tree.norm(exact_grads)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, rough_grads, exact_grads))
    assert error < 12 * 2**-8 * size


def test_metrics_of_parts_add_up():
    logits, batch = example()
    task = TokenPrediction(TokenPredictionConfig(), Logits())
    whole = task.loss(logits, batch, None, False)[1]
    parts = [
        task.loss(logits[r], {k: x[r] for k, x in batch.items()}, None, False)[1]
        for r in (slice(0, 1), slice(1, None))
    ]
    total = jax.tree.map(lambda a, b: a + b, *parts)
    assert values(total, "x") == pytest.approx(values(whole, "x"), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_smoothing", 1.0, "task.label_smoothing=1.0: must lie in [0, 1)"),
        ("label_smoothing", -0.1, "task.label_smoothing=-0.1: must lie in [0, 1)"),
        ("z_loss", -1.0, "task.z_loss=-1.0: must not be negative"),
    ],
)
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenPredictionConfig(**{field: value}).validate()
