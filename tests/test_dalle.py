"""Both stages of DALL-E on a folder of pictures with captions, and what they draw."""

import csv
import shutil

import jax
import numpy as np
import pytest
from laws import flat
from PIL import Image

from triform import evaluate, generate, models, tasks, train, trained_codecs, workdir
from triform.configs import contrastive, dalle, dvae
from triform.configs.schema import update
from triform.data.batch import zeros
from triform.data.datasets import EVALUATION, dataset
from triform.data.datasets.base import Epoch
from triform.experiment import Experiment
from triform.input_pipeline import Split, TrainBatches
from triform.models import DiscreteVAEConfig
from triform.runtime.errors import DataError, UserError
from triform.runtime.metrics import Mean
from triform.tasks import Context, ImageCodingConfig
from triform.tasks.code_use import CodesUsed, UsePerplexity, histogram

COLOURS = {"white": 255, "grey": 120, "dark": 40}
SIDES = {"left": (slice(None), slice(0, 4)), "top": (slice(0, 4), slice(None))}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 pictures of 8 x 8, each with a caption: 'a dark top'."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    with open(folder / "metadata.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["file_name", "text"])
        for number in range(48):
            colour, side = [*COLOURS][number % 3], [*SIDES][number // 3 % 2]
            image = rng.integers(0, 30, (8, 8)).astype(np.uint8)
            image[SIDES[side]] = COLOURS[colour] - rng.integers(0, 20)
            Image.fromarray(image).save(folder / f"{number:02}.png")
            table.writerow([f"{number:02}.png", f"a {colour} {side}"])
    return folder


def short(module, pictures, **changes):
    """The smoke variant on these pictures: four steps, a checkpoint after two."""
    config = module.get_config("smoke")
    update(config, {"data.source": str(pictures), "data.batch_size": 8})
    update(config, {"data.train_split": "train", "data.held_out": 0.2})
    update(config, {"steps": 4, "evaluation.every": 4, "checkpoint.every": 2})
    update(config, changes)
    return config


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    """(workdir of stage 1, of stage 2); that of stage 1 is gone when this is tested."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = str(folder / "dvae"), str(folder / "dalle")
    scores = train.run(short(dvae, pictures), first)
    assert np.isfinite(scores["test/loss"]) and 1 <= scores["test/used"] <= 16
    config = short(dalle, pictures, **{"data.codes": first})
    scores = train.run(config, second)
    assert np.isfinite(scores["test/loss"])
    shutil.copytree(first, folder / "copy")
    shutil.rmtree(first)
    return str(folder / "copy"), second


def params(path):
    return flat(workdir.load(path, "latest").params)


class Stop:
    """Ends a run after its second step or so."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return "enough" if self.calls > 2 else ""


def test_stopped_and_resumed_is_bitwise_the_same(pictures, runs, tmp_path):
    """Law 6, of both stages."""
    second = short(dalle, pictures, **{"data.codes": runs[0]})
    for number, config in enumerate((short(dvae, pictures), second)):
        path = str(tmp_path / str(number))
        assert train.run(config, path, stop=Stop()) == {}
        assert train.run(config, path)["test/loss"]
        expected = params(runs[number])
        for name, x in params(path).items():
            np.testing.assert_array_equal(x, expected[name], err_msg=name)


def test_every_example_is_scored_once_and_reconstructions_are_shown(runs):
    """Law 7; originals are above what comes back of them."""
    for path in runs:
        result = evaluate.run(path, "validation", predictions=True)
        rows = [x["example"] for x in result.predictions]
        assert rows == list(range(len(rows))) and rows
        losses = np.mean([x["loss"] for x in result.predictions])
        name = "reconstruction_loss" if path == runs[0] else "code_loss"
        assert result.numbers()[f"validation/{name}"] == pytest.approx(losses, rel=1e-4)
        if path == runs[0]:
            sheet = Image.open(f"{path}/samples/step_00000004.png")
            assert sheet.size == (len(rows) * 8, 2 * 8)


def test_the_codec_is_kept_with_the_run(runs):
    first, second = runs
    data = workdir.open_config(second).data
    kept = trained_codecs.load(second, data)["codes"]
    data.codes = first
    (fresh,) = trained_codecs.from_runs(data, workdir.open_run).values()
    assert kept.digest() == fresh.digest()
    images = [np.full((8, 8), 200, np.uint8), np.zeros((9, 12, 3), np.uint8)]
    codes = kept.encode(images)
    np.testing.assert_array_equal(codes, fresh.encode(images))
    assert codes.shape == (2, 16) and codes.max() < kept.size == 16
    assert kept.decode(codes).shape == (2, 8, 8, 1)
    # The model that evaluation uses gives the same of the likeliest codes.
    run = workdir.open_run(first)
    image = kept.data and images[0][None, ..., None] / np.float32(255)
    out = run.experiment.model.apply(run.variables, {"image": image})
    expected = np.clip(np.rint(out["image"] * 255), 0, 255)
    np.testing.assert_allclose(kept.decode(codes)[:1], expected, atol=1)


@pytest.fixture
def sampler(runs, monkeypatch):
    """(settings) -> a sampler whose pictures are their codes."""

    def make(**settings):
        made = generate.Sampler(runs[1], **settings)
        monkeypatch.setattr(made.codecs["codes"], "decode", lambda codes: codes)
        return made

    return make


def test_guided_drawing_is_that_of_full_passes(sampler):
    """With one cache for both: greedy codes of plain + weight (given - plain)."""
    made, weight = sampler(method="greedy", guidance=3.0), 3.0
    texts = ["a dark top", "a white left with many more words than fit in a row " * 3]
    found = made(texts)
    assert "left out" in found[1].warnings[0]
    run, kind = made.run, made.kind
    batch, _ = kind.batch([kind.read(text) for text in texts], 2)
    bare = np.zeros_like(batch["text_segments"])
    bare[:, 0] = 1
    apply = jax.jit(run.experiment.model.apply)
    for step in range(16):
        given, plain = (
            apply(run.variables, {**batch, "text_segments": x})["codes"]
            for x in (batch["text_segments"], bare)
        )
        logits = np.asarray(plain + weight * (given - plain))[:, step]
        batch["codes"][:, step] = logits.argmax(-1)
    for row, output in enumerate(found):
        np.testing.assert_array_equal(output.image, batch["codes"][row])


def test_without_guidance_texts_count_and_with_weight_0_they_do_not(sampler):
    texts = ["a dark top", "a white left"]

    def drawn(**settings):
        made = sampler(**settings)
        # The same request number: the same random numbers.
        return [made([text], num_samples=3)[0].samples for text in texts]

    first, second = drawn(guidance=0.0)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
    scores = [[x.score for x in row] for row in drawn(temperature=1.0)]
    assert scores[0] != scores[1]


def test_the_upper_half_of_a_picture_is_kept(sampler, pictures):
    made = sampler(temperature=1.0)
    path = str(pictures / "03.png")
    codes = made.codecs["codes"].encode([np.asarray(Image.open(path))])[0]
    whole, completed = made(["a dark top", {"text": "a dark top", "image": path}])
    np.testing.assert_array_equal(completed.image[:8], codes[:8])
    assert (whole.image[:8] != codes[:8]).any()
    # What is given has no odds: the score is that of the other half.
    assert completed.score > whole.score


def test_pictures_are_written_as_a_grid_and_ranked(runs, pictures, tmp_path):
    ranker = str(tmp_path / "ranker")
    train.run(short(contrastive, pictures), ranker)
    sampler = generate.Sampler(runs[1], rerank=ranker, temperature=1.0)
    (output,) = sampler(["a dark top"], num_samples=5)
    scores = [x.score for x in output.samples]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    pair = {"text": "a dark top", "image": output.image}
    (again,) = generate.Sampler(ranker)([pair])
    assert again.score == pytest.approx(scores[0], rel=1e-5)

    file = generate.PictureFile(str(tmp_path / "new" / "grid.png"))
    file.open()
    file.write(output.row(sampler.gives))
    file.close()
    # Five pictures are three and two, each eight times as large, with gaps of 4.
    assert Image.open(file.path).size == (3 * 68 + 4, 2 * 68 + 4)
    with pytest.raises(UserError, match="is there already.*--overwrite"):
        generate.PictureFile(file.path)
    with pytest.raises(UserError, match="rerank=.*does not score pairs"):
        generate.Sampler(runs[1], rerank=runs[1])
    with pytest.raises(UserError, match="guidance=2.0: .*draws no pictures"):
        generate.Sampler(runs[0], guidance=2.0)


def test_a_command_that_is_printed_names_what_it_needs(runs, pictures):
    for config in map(workdir.open_config, runs):
        command = workdir.request_command(config, workdir="w")
        assert command.endswith(" --output=out.png")
    labels = dvae.get_config("smoke")
    labels.data.label = "label"
    assert "--output" not in workdir.request_command(labels, workdir="w")
    pairs = workdir.request_command(contrastive.get_config("smoke"), workdir="w")
    assert pairs.endswith(r" --input=$'a caption\tpicture.png'")


def test_mistakes_are_one_line(runs, pictures):
    config = short(dalle, pictures, **{"data.codes": ""})
    with pytest.raises(UserError, match="data.codes='': name the workdir"):
        train.resolve(config)
    config.data.codes = f"{pictures}/nothing"
    with pytest.raises(UserError, match="data.codes: .*nothing'?: holds no config"):
        train.resolve(config)
    config.data.codes = runs[1]
    with pytest.raises(UserError, match="holds a TextToImageConfig; name"):
        train.resolve(config)
    config.data.codes, config.data.grid = runs[0], 3
    config, codecs = train.resolve(config)
    assert config.model.num_codes == 16
    with pytest.raises(DataError, match="data.grid=3: .*has 4 codes a side"):
        dataset(config.data, "train", codecs, config.model.sizes())


def test_captions_are_left_out_in_training_only(runs, pictures):
    config = short(dalle, pictures, **{"data.codes": runs[0]})
    config.data.text_dropout = 0.5
    config, codecs = train.resolve(config)
    split = Split.open(config.data, codecs, "train", config.model.sizes())
    batches = TrainBatches(split.batches, 0)
    lengths = np.concatenate(
        [batches[i]["text_segments"].sum(1) for i in range(4 * batches.per_epoch)]
    )
    lengths = lengths[lengths > 0]
    assert 0.3 < (lengths == 1).mean() < 0.7
    for _, batch in split.batches.evaluation():
        real = batch["text_segments"].sum(1)
        assert (real[real > 0] > 1).all()
    # Codes are those of the codec, of each picture.
    first = batches[0]
    item = batches.ids(0)[1][0]
    codes = codecs["codes"].encode([split.dataset.example(item)["image"]])
    np.testing.assert_array_equal(first["codes"][0], codes[0])


def test_a_model_without_texts_is_evaluated_without(runs, pictures):
    config = short(dalle, pictures, **{"data.codes": runs[0]})
    config.data.text_dropout = 1.0
    config, codecs = train.resolve(config)
    # As in training, a mean of no token adds nothing to the objective.
    nothing, codes = Mean(np.float32(0), np.float32(0)), Mean(np.float32(6), 2.0)
    terms = {"terms": {"text": nothing, "code": codes}}
    assert Experiment(config).values(terms, 0) == {"code_loss": 3.0, "loss": 3 * 7 / 8}
    split = Split.open(config.data, codecs, "validation", config.model.sizes())
    for _, batch in split.batches.evaluation():
        assert (batch["text_segments"].sum(1) == batch["code_weights"].max(1)).all()


def test_tokens_are_left_out_in_training_only(runs, pictures):
    config = short(dalle, pictures, **{"data.codes": runs[0]})
    config.data.token_dropout, config.data.text_dropout = 0.5, 0.0
    config, codecs = train.resolve(config)
    split = Split.open(config.data, codecs, "train", config.model.sizes())
    whole = split.dataset.tokens[0].tolist()

    def written(epoch):
        batch = zeros(split.dataset.spec, {"B": 1, "S": 16, "L": 16})
        split.dataset.write(batch, 0, 0, epoch)
        return batch["text"][0][batch["text_segments"][0] > 0].tolist()[1:]

    assert written(EVALUATION) == whole
    found = [written(Epoch(0, n, train=True)) for n in range(100)]
    share = np.mean([len(ids) for ids in found]) / len(whole)
    assert 0.35 < share < 0.65
    for ids in found:  # what is kept is in order
        rest = iter(whole)
        assert all(i in rest for i in ids)


def test_mirrored_codes_are_those_of_mirrored_images_in_training_only(runs, pictures):
    config = short(dalle, pictures, **{"data.codes": runs[0], "data.flip": True})
    config, codecs = train.resolve(config)
    split = Split.open(config.data, codecs, "train", config.model.sizes())
    images = [split.dataset.example(i)["image"] for i in range(8)]
    plain = codecs["codes"].encode(images)
    mirrored = codecs["codes"].encode([image[:, ::-1] for image in images])
    item = int(np.argmax((plain != mirrored).any(1)))
    both = {tuple(plain[item]), tuple(mirrored[item])}
    assert len(both) == 2

    def written(epochs):
        batch = zeros(split.dataset.spec, {"B": 1, "S": 16, "L": 16})
        for epoch in epochs:
            split.dataset.write(batch, 0, item, epoch)
            yield tuple(batch["codes"][0])

    assert {*written(Epoch(0, n, train=True) for n in range(20))} == both
    assert {*written([EVALUATION])} == {tuple(plain[item])}


def test_the_objective_of_codes_is_the_formula():
    """Logit-Laplace (A.3) and KL to uniform, and their schedules."""
    rng = np.random.default_rng(0)
    image = rng.random((2, 4, 4, 1))
    outputs = {
        "image": rng.random(image.shape),
        "location": rng.standard_normal(image.shape),
        "log_scale": rng.standard_normal(image.shape),
        "codes": rng.standard_normal((2, 2, 2, 5)),
    }
    batch = {"image": image, "image_weights": np.array([1.0, 0.5])}
    config = ImageCodingConfig(kl_steps=4, temperature_steps=8)
    task = tasks.build(config, None)
    terms = task.terms(outputs, batch, Context(0, {}))
    x = 0.8 * image + 0.1
    logit, b = np.log(x / (1 - x)), np.exp(outputs["log_scale"])
    density = np.exp(-np.abs(logit - outputs["location"]) / b) / (2 * b * x * (1 - x))
    nll = -np.log(density).sum((1, 2, 3))
    assert terms["reconstruction"] == pytest.approx(nll @ [1, 0.5], rel=1e-5)
    q = np.exp(outputs["codes"])
    q /= q.sum(-1, keepdims=True)
    kl = (q * np.log(q * 5)).sum(-1).mean((1, 2))
    assert terms["kl"] == pytest.approx(kl @ [1, 0.5], rel=1e-5)
    assert task.weights(batch) == {"reconstruction": 1.5 * 16, "kl": 1.5}
    # 6.6 of 192 numbers a code, half after half of the steps.
    halves = [float(task.coefficients(step)["kl"]) for step in (1, 3, 99)]
    assert halves == pytest.approx([6.6 / 192 / 2, 6.6 / 192, 6.6 / 192])
    heat = [float(task.temperature(step)) for step in (3, 7, 99)]
    assert heat == pytest.approx([(1 + 1 / 16) / 2, 1 / 16, 1 / 16])


def test_the_picture_of_a_model_is_the_peak_of_its_distribution():
    """Model and task move pixels by the same margin."""
    config = DiscreteVAEConfig(image_size=4, channels=1, num_codes=5, width=4, stages=1)
    image = np.random.default_rng(0).random((2, 4, 4, 1)).astype(np.float32)
    module, rng = models.build(config), jax.random.key(0)
    outputs, _ = module.init_with_output(rng, {"image": image})
    task = tasks.build(ImageCodingConfig(), None)

    def nats(moved):
        """Of the model's own picture, under its distribution moved by so much."""
        location = outputs["location"] + moved
        found = task.predict({**outputs, "location": location}, outputs)
        return found["loss"]

    assert (nats(0.0) < nats(0.01)).all() and (nats(0.0) < nats(-0.01)).all()


def test_the_use_of_codes_is_counted_over_all_batches():
    codes = np.array([[0, 0, 3], [3, 3, 1]])
    counts = histogram(codes, np.array([1.0, 0.0]), 5)
    np.testing.assert_array_equal(counts, [2, 0, 0, 1, 0])
    total = counts + histogram(codes, np.array([1.0, 1.0]), 5)
    assert CodesUsed(total, total.sum()).value() == 3
    shares = np.array([4, 1, 4]) / 9
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert UsePerplexity(total, total.sum()).value() == pytest.approx(expected)
