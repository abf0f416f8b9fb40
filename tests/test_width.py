"""New models, objectives and data need no change of the step: each is a row of a table.

Law 11: what is frozen stays byte-identical. Law 12: every system overfits one batch.
"""

import copy
import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
from laws import flat, update
from PIL import Image
from test_placements import (
    LENGTH,
    ROWS,
    SYSTEMS,
    TRAINED,
    VOCAB,
    batch_of,
    experiment,
)

from triform import evaluate, train, workdir
from triform.configs import autoencoder_mnist, bert_finetune, distill_mr_sentiment
from triform.configs.schema import smoke
from triform.data import datasets
from triform.data.datasets import ImagesConfig
from triform.experiment import Experiment
from triform.models import AutoencoderConfig, DistillationConfig, EncoderConfig
from triform.runtime.optim import OptimConfig
from triform.runtime.partition import Across

# What keeps a loss above 0 is off: mixed and smoothed labels, and a teacher that does
# not agree with them.
EXACT = {
    "t5": {"task.label_smoothing": 0.0},
    "vit, mixed labels": {"task.label_smoothing": 0.0, "data.mixup": 0.0},
    "autoencoder": {"task.latent_penalty": 1e-5},
    "distillation": {"task.label_share": 0.0},
    "discrete vae": {"task.kl_weight": 0.0},
    "bert4rec": {"task.label_smoothing": 0.0},
}


def exact(name):
    """The system with a fast optimiser, and a batch that it can learn by heart."""
    config = copy.deepcopy(experiment(name).config)
    for key, value in EXACT.get(name, {}).items():
        part, field = key.split(".")
        setattr(
            config, part, dataclasses.replace(getattr(config, part), **{field: value})
        )
    config.optim = OptimConfig("adam", 2e-2, "constant", 5, b2=0.99, eps=1e-8)
    config.optim.train = TRAINED.get(name, config.optim.train)
    made = Experiment(config)
    batch = batch_of(made)
    real = np.arange(ROWS) < ROWS - 1
    for key, x in batch.items():
        if key.endswith(("weights", "segments")):
            x[real] = 1
        elif key == "masked_positions":  # each once
            x[real] = np.arange(LENGTH)[-x.shape[1] :]
        elif key == "negatives":  # others than the targets
            x[real] = (batch["targets"][real][..., None] + 1) % VOCAB
        elif key in ("inputs", "encoder_inputs", "text"):  # no two rows begin alike
            x[real, 0] = np.arange(ROWS)[real]
    return made, batch


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_overfits_one_batch(name):
    made, batch = exact(name)

    @jax.jit
    def run(state):
        def step(state, _):
            state, measured = made.train_step(state, batch, Across())
            return state, measured["loss"].total

        return jax.lax.scan(step, state, None, 150)[1]

    losses = run(made.make_state())
    assert losses[-10:].max() < 0.05 * losses[0], losses[:: len(losses) // 10]


@pytest.mark.parametrize("name", TRAINED)
def test_frozen_parameters_stay_and_take_no_optimiser_memory(name):
    alone = experiment(name, devices=1)
    start = jax.tree.map(np.asarray, jax.jit(alone.make_state)().replace(rng=None))
    after, _ = update(alone, start, batch_of(alone))
    before, frozen = flat(start.frozen), flat(after.frozen)
    assert before.keys() == frozen.keys()
    for key, x in before.items():
        np.testing.assert_array_equal(frozen[key], x, err_msg=key)
    trained = sum(x.size for x in jax.tree.leaves(after.params))
    moments = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
    assert moments == 2 * trained
    assert any(
        (x != y).any() for x, y in zip(*map(_leaves, (start, after)), strict=True)
    )


def _leaves(state):
    return jax.tree.leaves(state.params)


def test_the_teacher_is_the_model_that_it_was_and_passes_no_gradient():
    made, batch = exact("distillation")
    params = jax.jit(made.make_state)().variables()["params"]
    teacher = made.model.teacher

    @jax.jit
    def run(params):
        def total(params):
            rngs = {"dropout": jax.random.key(1)}
            outputs = made.model.apply({"params": params}, batch, rngs=rngs)
            return sum(x.sum() for x in outputs.values()), outputs

        alone = teacher.apply({"params": params["teacher"]}, batch)
        return alone, jax.grad(total, has_aux=True)(params)

    alone, (grads, outputs) = run(params)
    np.testing.assert_allclose(outputs["teacher_label"], alone["label"], rtol=1e-6)
    assert not any(x.any() for x in jax.tree.leaves(grads["teacher"]))
    assert any(x.any() for x in jax.tree.leaves(grads["student"]))


def test_terms_have_their_own_denominators():
    made, batch = exact("autoencoder")
    batch["image_weights"][:] = [1, 0.5, 0, 1, 1, 0]
    state = jax.jit(made.make_state)()
    outputs = jax.device_get(made.model.apply(state.variables(), batch))
    sums, _ = jax.jit(lambda *x: made.eval_step(*x, Across()))(
        state.variables(), state.step, batch
    )
    weights, rows = batch["image_weights"], (1, 2, 3)
    squared = ((outputs["image"] - batch["image"]) ** 2).mean(rows)
    latent = np.abs(outputs["latent"]).sum(rows)
    found = made.values(sums, step=1)
    expected = {
        "reconstruction_loss": (weights @ squared) / weights.sum(),
        "latent_loss": (weights @ latent) / weights.sum(),
    }
    # After 2 of 4 steps of warm-up.
    share = made.config.task.latent_penalty / 2
    expected["loss"] = expected["reconstruction_loss"] + share * expected["latent_loss"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(float(value), rel=1e-5), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AutoencoderConfig(28, 1, stages=3), "model.stages=3: .*image_size=28"),
        (AutoencoderConfig(0, 1), "model.image_size=0: must be at least 1"),
        (
            DistillationConfig(EncoderConfig(vocab_size=9), EncoderConfig()),
            "model.student.vocab_size=9: must equal .*32000",
        ),
        (ImagesConfig(label="", mixup=0.1), "data.mixup=0.1: .*label"),
    ],
)
def test_mistakes_have_messages(config, message):
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_images_follow_the_data():
    config = autoencoder_mnist.get_config()
    config.data.size, config.data.channels = 32, 3
    model = config.resolved().model
    assert (model.image_size, model.channels) == (32, 3)


# --- Runs ---


def pictures(count):
    rng = np.random.default_rng(0)
    return [{"image": rng.integers(0, 256, (8, 8, 1), np.uint8)} for _ in range(count)]


def test_an_autoencoder_runs_and_shows_its_reconstructions(sources, tmp_path):
    sources(mnist=pictures(70))
    config = autoencoder_mnist.get_config("smoke")
    config.data.size, config.evaluation.samples = 8, 3
    scores = train.run(config, tmp_path / "run")
    assert scores["test/reconstruction_loss"] > 0
    files = sorted(x.name for x in (tmp_path / "run" / "samples").iterdir())
    # The test split is the evaluation split: it is not scored again.
    assert files == ["step_00000004.png", "step_00000006.png"]
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / files[-1]))
    assert grid.shape == (2 * 8, 3 * 8)
    originals = np.hstack([x["image"][..., 0] for x in pictures(3)])
    np.testing.assert_array_equal(grid[:8], originals)
    result = evaluate.run(tmp_path / "run", predictions=True)
    assert [x["example"] for x in result.predictions] == list(range(70))
    assert result.samples.files[".png"]


def test_samples_have_the_colours_of_the_images(sources):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    sources(m=[{"image": x} for x in images])
    config = ImagesConfig(
        *("m",), size=8, label="", mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4)
    )
    dataset = datasets.dataset(config, "train", {}, {})
    shown = (images / 255 - config.mean) / config.std
    rows = [{"image": x} for x in shown[::-1]]
    (content,) = dataset.samples([0, 1], rows).values()
    grid = np.asarray(Image.open(io.BytesIO(content)))
    expected = np.vstack([np.hstack(images), np.hstack(images[::-1])])
    np.testing.assert_array_equal(grid, expected)


def test_a_probe_runs_and_is_distilled(sources, tmp_path):
    words = ["good", "bad", "fine", "dull"]
    texts = itertools.product(words, words, words)
    examples = [{"text": " ".join(x), "label": x[0] in words[::2]} for x in texts]
    examples = [{**x, "label": int(x["label"])} for x in examples]
    sources(mr_sentiment=examples)
    config = bert_finetune.get_config("mr_sentiment")
    config.optim.train = bert_finetune.get_config("probe").optim.train
    smoke(config)
    teacher = str(tmp_path / "teacher")
    assert np.isfinite(train.run(config, teacher)["test/loss"])
    trained = workdir.load(teacher).params["params"]

    config = distill_mr_sentiment.get_config("smoke")
    config.init = distill_mr_sentiment.rules(teacher, layers=2)
    config.model.student.trunk.num_layers = 1
    path = str(tmp_path / "student")
    scores = train.run(config, path)
    assert scores["test/teacher_accuracy"] >= 0
    found = workdir.load(path).params["params"]
    for key, x in flat(trained).items():
        np.testing.assert_array_equal(flat(found["teacher"])[key], x, err_msg=key)
    assert set(found["student"]["encoder"]) == set(trained["encoder"]) - {"layer_1"}
