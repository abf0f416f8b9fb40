"""Tasks against explicit NumPy formulas."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from triform import models, tasks
from triform.runtime.metrics import CalibrationError, Mean, values
from triform.tasks import (
    ClassificationConfig,
    Context,
    PretrainingConfig,
    RegressionConfig,
    TokenPredictionConfig,
)

ROWS, LENGTH, VOCAB = 3, 5, 7


class Logits:
    """A model whose parameters are its logits."""

    def apply(self, variables, batch, rngs, mutable):
        logits = variables["params"]
        return (logits if isinstance(logits, dict) else {"targets": logits}), {}


def sums(task, logits, batch, train):
    """({term: (total, weight)}, {name: metric}) of a batch."""
    ctx = Context(jnp.int32(0), {}, train)
    outputs, _ = task.outputs({"params": logits}, batch, ctx)
    terms, weights = task.terms(outputs, batch, ctx), task.weights(batch)
    assert terms.keys() == weights.keys()
    found = {k: Mean(terms[k], weights[k]) for k in terms}
    return found, task.metrics(outputs, batch, ctx)


def objective(task, logits, batch, train):
    """(sum of the terms' means, {name: value}) on the host."""
    terms, measured = sums(task, logits, batch, train)
    values = {k: m.value() for k, m in measured.items()}
    values |= {f"{k}_loss": m.value() for k, m in terms.items()}
    loss = sum(m.value() for m in terms.values())
    return loss, values | {"loss": loss}


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
    task = tasks.build(TokenPredictionConfig(**options), Logits())
    return objective(task, logits, batch, train)


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
    task = tasks.build(TokenPredictionConfig(label_smoothing=0.2), Logits())

    def ours(logits):
        return sums(task, logits, batch, True)[0]["token"].total

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
            mean = sums(task, params["params"], batch, False)[0]["token"]
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
    task = tasks.build(TokenPredictionConfig(), Logits())
    every = sums(task, logits, batch, False)
    parts = [
        sums(task, logits[r], {k: x[r] for k, x in batch.items()}, False)
        for r in (slice(0, 1), slice(1, None))
    ]
    total = jax.tree.map(lambda a, b: a + b, *parts)
    for got, want in zip(total, every, strict=True):
        assert values(got, "x") == pytest.approx(values(want, "x"), rel=1e-6)


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


# --- Labels of whole rows ---


def assess(config, logits, batch, train=False):
    """(loss, {name: value}) on the host, of any task."""
    return objective(tasks.build(config, Logits()), logits, batch, train)


def assert_parts_add_up(config, logits, batch, train):
    """Loss, metrics and gradients of one row and of the others, added."""
    task = tasks.build(config, Logits())

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(logits, batch):
        terms, measured = sums(task, logits, batch, train)
        # Each term counts in its own way.
        loss = sum((i + 1) * m.total for i, m in enumerate(terms.values()))
        return loss, (terms, measured)

    def part(rows):
        return run(*jax.tree.map(lambda x: x[rows], (logits, batch)))

    whole, grads = part(slice(None))
    (first, one), (second, two) = part(slice(0, 1)), part(slice(1, None))
    total = jax.tree.map(lambda a, b: a + b, first, second)
    for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), one, two)
    for name, want in grads.items():
        np.testing.assert_allclose(joined[name], want, rtol=1e-6, atol=1e-6)


def pretraining_example(masked):
    """Rows of so many masked places; the last row is padding."""
    rng = np.random.default_rng(0)
    rows, places = len(masked) + 1, max(masked)
    logits = {
        "targets": 2 * rng.standard_normal((rows, places, VOCAB)),
        "label": 2 * rng.standard_normal((rows, 2)),
    }
    batch = {
        "targets": rng.integers(0, VOCAB, (rows, places)),
        "weights": np.arange(places) < np.array([*masked, 0])[:, None],
        "label": rng.integers(0, 2, rows),
        "label_weights": np.arange(rows) < len(masked),
    }
    logits = {k: x.astype(np.float32) for k, x in logits.items()}
    return logits, {
        k: x.astype(np.float32 if "weights" in k else np.int32)
        for k, x in batch.items()
    }


def smoothed(logits, ids, smoothing):
    """Cross-entropy with smoothed targets, float64."""
    classes = logits.shape[-1]
    q = (1 - smoothing) * np.eye(classes)[ids] + smoothing / classes
    return -(q * log_softmax(logits)).sum(-1)


@pytest.mark.parametrize(
    ("train", "smoothing"), [(False, 0.3), (True, 0.0), (True, 0.3)]
)
def test_pretraining_is_the_sum_of_two_means(train, smoothing):
    """Whatever the number of masked positions of each row (Devlin et al. 2019, 3.1)."""
    logits, batch = pretraining_example((1, 4, 2))
    config = PretrainingConfig(label_smoothing=smoothing)
    loss, measured = assess(config, logits, batch, train)
    terms = {}
    for name, weights in (("targets", "weights"), ("label", "label_weights")):
        loss_terms = smoothed(logits[name], batch[name], smoothing if train else 0)
        plain = smoothed(logits[name], batch[name], 0)
        right = logits[name].argmax(-1) == batch[name]
        terms[name] = [average(x, batch[weights]) for x in (loss_terms, plain, right)]
    expected = terms["targets"][0] + terms["label"][0]
    assert loss == measured["loss"] == pytest.approx(expected, rel=1e-6)
    for name, key in (("masked", "targets"), ("next", "label")):
        assert measured[f"{name}_loss"] == pytest.approx(terms[key][0], rel=1e-6)
        assert measured[f"{name}_accuracy"] == pytest.approx(terms[key][2])


@pytest.mark.parametrize("train", [False, True])
def test_parts_of_pretraining_add_up(train):
    logits, batch = pretraining_example((1, 4, 2))
    assert_parts_add_up(PretrainingConfig(label_smoothing=0.1), logits, batch, train)


def classification_example():
    rng = np.random.default_rng(0)
    logits = {"label": 2 * rng.standard_normal((6, 4)).astype(np.float32)}
    batch = {
        "label": rng.integers(0, 4, 6),
        "label_weights": np.array([1, 0.5, 1, 0, 2, 1], np.float32),
    }
    return logits, batch


TRAINED = ClassificationConfig(label_smoothing=0.2, z_loss=0.05)


@pytest.mark.parametrize("train", [False, True])
def test_classification_is_the_formula(train):
    logits, batch = classification_example()
    loss, measured = assess(TRAINED, logits, batch, train)
    x = logits["label"].astype(np.float64)
    terms = smoothed(x, batch["label"], 0.2 if train else 0)
    terms += 0.05 * train * np.log(np.exp(x).sum(-1)) ** 2
    expected = average(terms, batch["label_weights"])
    assert loss == measured["loss"] == pytest.approx(expected, rel=1e-6)
    right = x.argmax(-1) == batch["label"]
    assert measured["accuracy"] == pytest.approx(average(right, batch["label_weights"]))
    assert ("ece" in measured) == (not train)
    assert_parts_add_up(TRAINED, logits, batch, train)


@pytest.mark.parametrize("train", [False, True])
def test_a_distribution_of_labels_is_the_expectation_over_them(train):
    logits, batch = classification_example()
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    mixed = batch | {"label": p}
    found = assess(TRAINED, logits, mixed, train)[0]
    expected = 0.0
    for row in range(6):
        alone = np.arange(6) == row
        for label in range(4):
            single = {
                "label": np.full(6, label),
                "label_weights": alone * np.float32(1),
            }
            value = assess(TRAINED, logits, single, train)[0]
            expected += batch["label_weights"][row] * p[row, label] * value
    assert found == pytest.approx(expected / batch["label_weights"].sum(), rel=1e-5)
    assert_parts_add_up(TRAINED, logits, mixed, train)
    # All of it on one label is that label.
    certain = batch | {"label": np.eye(4, dtype=np.float32)[batch["label"]]}
    plain = assess(TRAINED, logits, batch, train)[1]
    assert assess(TRAINED, logits, certain, train)[1] == pytest.approx(plain, rel=1e-6)


def test_regression_is_squared_error_and_two_correlations():
    rng = np.random.default_rng(0)
    label = rng.uniform(0, 5, 40).astype(np.float32)
    found = (0.5 * label + rng.standard_normal(40)).astype(np.float32)
    weights = rng.choice([0.0, 1.0], 40).astype(np.float32)
    logits, batch = (
        {"label": found[:, None]},
        {"label": label, "label_weights": weights},
    )
    loss, measured = assess(RegressionConfig(), logits, batch)
    error = average((found.astype(np.float64) - label) ** 2, weights)
    assert loss == measured["loss"] == pytest.approx(error, rel=1e-6)
    counted = weights > 0
    pearson = np.corrcoef(found[counted], label[counted])[0, 1]
    rows = {"number": found[counted], "true_number": label[counted]}
    task = tasks.build(RegressionConfig(), Logits())
    assert task.score(rows)["pearson"] == pytest.approx(pearson, abs=1e-12)
    # A large mean changes nothing: years, prices, temperatures in kelvin.
    far = {k: x.astype(np.float64) + 1e6 for k, x in rows.items()}
    assert task.score(far)["pearson"] == pytest.approx(pearson, abs=1e-9)
    assert_parts_add_up(RegressionConfig(), logits, batch, True)
    # Ranks alone count; equal numbers share theirs.
    some = {"number": np.exp(rows["number"]), "true_number": rows["true_number"] // 1}
    expected = scipy.stats.spearmanr(*some.values()).statistic
    assert task.score(some)["spearman"] == pytest.approx(expected, abs=1e-12)
    # Without spread there is no correlation.
    flat = rows | {"number": np.full(counted.sum(), 2.0, np.float32)}
    assert math.isnan(task.score(flat)["pearson"])


def test_ties_are_not_right_answers():
    """A collapsed model is right for one class in V, not always."""
    logits, batch = example()
    accuracy = measure(np.zeros_like(logits), batch, False)[1]["accuracy"]
    assert accuracy == pytest.approx(1 / VOCAB)
    rows, labels = classification_example()
    flat = {"label": np.zeros_like(rows["label"])}
    accuracy = assess(ClassificationConfig(), flat, labels)[1]["accuracy"]
    assert accuracy == pytest.approx(1 / 4)


@pytest.mark.parametrize("name", ["token", "label", "pretraining", "regression"])
def test_predictions_have_a_row_per_example(name):
    logits, batch = {
        "token": lambda: ({"targets": example()[0]}, example()[1]),
        "label": classification_example,
        "pretraining": lambda: pretraining_example((1, 4, 2)),
        "regression": lambda: (
            {"label": np.arange(3.0)[:, None]},
            {"label": np.ones(3), "label_weights": np.ones(3)},
        ),
    }[name]()
    config = {
        "token": TokenPredictionConfig(),
        "label": ClassificationConfig(),
        "pretraining": PretrainingConfig(),
        "regression": RegressionConfig(),
    }[name]
    rows = tasks.build(config, Logits()).predict(logits, batch)
    count = len(next(iter(batch.values())))
    assert {len(x) for x in rows.values()} == {count}
    assert rows["loss"].shape == (count,)
