"""Images: rows, augmentation, mixing."""

import dataclasses
import re

import numpy as np
import pytest

from triform.data import datasets
from triform.data.codecs import files
from triform.data.datasets import EVALUATION, Epoch, ImagesConfig, augment
from triform.input_pipeline import Batches, Split, TrainBatches, report
from triform.runtime.errors import DataError

SIZES = {"num_labels": 4}
TRAIN = Epoch(seed=0, number=0, train=True)
CHANGES = {
    "none": {},
    "pad": {"crop": "pad", "pad": 2},
    "resized": {"crop": "resized"},
    "flip": {"flip": True},
    "augment": {"rand_augment": 2},
    "mixup": {"mixup": 0.4},
    "all": {"crop": "resized", "flip": True, "rand_augment": 1, "mixup": 1.0},
}


def pictures(count=10, shape=(8, 8, 1), seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"image": rng.integers(0, 256, shape, np.uint8), "label": i % 4}
        for i in range(count)
    ]


def config(**fields):
    return ImagesConfig(**{"source": "m", "size": 8, "channels": 1, **fields})


def opened(config, split="train", sizes=SIZES):
    config.validate()
    return datasets.dataset(config, split, files.build(config, sizes), sizes)


def row(dataset, item=0, epoch=EVALUATION):
    dataset.config = dataclasses.replace(dataset.config, batch_size=1)
    return Batches(dataset).collate(0, np.array([item]), epoch)


def test_rows_are_written_as_documented(sources):
    examples = pictures(3)
    loads = sources(m=examples)
    for _ in range(2):
        dataset = opened(config(mean=(0.2,), std=(0.4,)))
        batch = Batches(dataset).collate(0, np.arange(3), TRAIN)
        assert batch["image"].shape == (32, 8, 8, 1)
        assert {x.dtype for k, x in batch.items() if k != "label"} == {np.dtype("f4")}
        for i, example in enumerate(examples):
            expected = (example["image"] / 255 - 0.2) / 0.4
            np.testing.assert_allclose(batch["image"][i], expected, atol=1e-5)
        assert batch["label"][:4].tolist() == [0, 1, 2, 0]
        assert batch["label"].dtype == np.int32
        assert batch["label_weights"].tolist() == [1] * 3 + [0] * 29
        assert not batch["image"][3:].any()
        assert Batches(dataset).real(batch) == 3
    assert len(loads) == 2
    assert "label 0" in dataset.preview(batch)


def test_a_channel_has_its_own_mean(sources):
    sources(m=pictures(1, (8, 8, 3)))
    dataset = opened(config(channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25)))
    expected = (pictures(1, (8, 8, 3))[0]["image"] / 255 - (0.1, 0.2, 0.3)) / (
        1,
        0.5,
        0.25,
    )
    np.testing.assert_allclose(row(dataset)["image"][0], expected, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(8, 8, 1), (11, 9, 3)])
def test_a_batch_is_a_function_of_seed_and_step(sources, change, shape):
    sources(m=pictures(10, shape))
    made = config(batch_size=4, channels=shape[-1], **CHANGES[change])
    first, again, other = (
        TrainBatches(Batches(opened(made)), seed) for seed in (1, 1, 2)
    )
    seen = []
    for step in (5, 0, 3, 1, 2, 4):
        a, b = first[step], again[step]
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        seen += first.ids(step)[1].tolist()
        assert np.isfinite(a["image"]).all()
        assert np.abs(a["image"]).max() <= 1
    assert sorted(seen) == sorted([*range(10)] * 2)
    assert (first[0]["image"] != other[0]["image"]).any()
    assert report(first).startswith("data: m train, 10 rows and 3 batches an epoch")


@pytest.mark.parametrize("change", [k for k in CHANGES if k != "none"])
def test_training_changes_from_epoch_to_epoch_and_evaluation_never(sources, change):
    sources(m=pictures(6))
    dataset = opened(config(**CHANGES[change]))
    epochs = [
        np.stack([row(dataset, i, Epoch(0, e, True))["image"] for i in range(6)])
        for e in range(3)
    ]
    assert (epochs[0] != epochs[1]).any()
    plain = opened(config())
    for i in range(6):
        image = row(dataset, i)["image"]
        np.testing.assert_array_equal(image, row(dataset, i)["image"])
        if "resized" not in CHANGES[change].get("crop", ""):
            np.testing.assert_array_equal(image, row(plain, i)["image"])


def test_padding_and_cropping_moves_the_image():
    image = pictures(1)[0]["image"]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    found = set()
    for i in range(300):
        out = augment.shifted(image, 2, TRAIN.rng(i))
        found.add(next(n for n, crop in enumerate(crops) if (crop == out).all()))
    assert found == set(range(25))


def test_random_parts_lie_inside_and_vary():
    areas = []
    for i in range(300):
        left, upper, right, lower = augment.random_box(20, 30, TRAIN.rng(i))
        assert 0 <= left < right <= 30 and 0 <= upper < lower <= 20
        areas.append((right - left) * (lower - upper) / 600)
    assert min(areas) < 0.15 and max(areas) > 0.7


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_keep_shape_and_type(name, channels):
    image = augment.to_pillow(pictures(1, (12, 9, channels))[0]["image"])
    for strength in (-1.0, 0.0, 0.5, 1.0):
        out = augment.OPERATIONS[name](image, strength)
        assert (out.size, out.mode) == (image.size, image.mode)
    unchanged = ("autocontrast", "equalize", "solarize")
    if name not in unchanged:
        still = augment.OPERATIONS[name](image, 0.0)
        np.testing.assert_array_equal(np.asarray(still), np.asarray(image))


def test_mixed_labels_are_distributions_in_training_and_evaluation(sources):
    sources(m=pictures(40))
    dataset = opened(config(mixup=1.0))
    shares = []
    for i in range(40):
        batch = row(dataset, i, TRAIN)
        assert batch["label"].shape == (1, 4)
        assert batch["label"].sum() == pytest.approx(1)
        assert batch["label"][0, i % 4] > 0
        shares.append(batch["label"][0, i % 4])
        np.testing.assert_array_equal(row(dataset, i)["label"], np.eye(4)[[i % 4]])
    assert min(shares) < 0.4 < 0.9 < max(shares)


def test_a_mixed_image_is_the_mean_of_two(sources):
    sources(
        m=[{"image": np.full((8, 8, 1), 255 * i, np.uint8), "label": i} for i in (0, 1)]
    )
    dataset = opened(config(mixup=1.0, mean=(0.0,), std=(1.0,)))
    for epoch in range(10):
        batch = row(dataset, 0, Epoch(0, epoch, True))
        np.testing.assert_allclose(batch["image"], batch["label"][0, 1], atol=1e-6)


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_images_of_any_size_and_colour_become_squares(sources, crop):
    images = [*pictures(2, (20, 10, 3)), *pictures(2, (7, 9, 1)), *pictures(1, (8, 8))]
    sources(m=images)
    for channels in (1, 3):
        dataset = opened(config(channels=channels, crop=crop))
        batch = Batches(dataset).collate(0, np.arange(5), TRAIN)
        assert batch["image"].shape[1:] == (8, 8, channels)
        assert batch["label"][:5].tolist() == [0, 1, 0, 1, 0]


# --- What is refused ---


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_label_that_the_model_does_not_know_is_named(sources, mixup):
    made, sizes = config(mixup=mixup), {"num_labels": 3}
    message = r"m train, example 3: .*is 3, none of the 3 .*raise model.num_labels"
    sources(m=pictures(4))
    with pytest.raises(DataError, match=message):
        Split.open(made, files.build(made, sizes), "train", sizes)
    # Of images of several sizes, when it is read.
    sources(m=[*pictures(3), *pictures(4, (9, 9, 1))[3:]])
    with pytest.raises(DataError, match=message):
        for _ in Batches(opened(made, sizes=sizes)).evaluation():
            pass


def test_a_label_below_0_is_named_when_the_split_is_opened(sources):
    bad = {"image": np.zeros((8, 8, 1), np.uint8), "label": -1}
    sources(m={"train": pictures(4), "test": [*pictures(4), bad]})
    codecs = files.build(config(), SIZES)
    with pytest.raises(DataError, match="m test, example 4: .*is -1, none of the 4"):
        Split.open(config(), codecs, "test", SIZES)


def test_classes_are_those_of_the_source_or_as_many_as_the_model_has(sources):
    sources(m=pictures(4))
    assert files.build(config(), SIZES)["label"].names == ("0", "1", "2", "3")
    with pytest.raises(DataError, match="does not say how many.*set model.num_labels"):
        files.build(config(), {})
    sources(m=pictures(4), classes={"m:label": ("a", "b", "c", "d")})
    assert files.build(config(), SIZES)["label"].names == ("a", "b", "c", "d")
    with pytest.raises(DataError, match="model.num_labels=3: 'm' has 4 classes"):
        files.build(config(), {"num_labels": 3})


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"image": "x"},
            "data.label: 'm' has no feature 'label'; expected one of image",
        ),
        ({"image": np.zeros((2, 2)), "label": 0}, "is no uint8 image (float64 (2, 2))"),
        (
            {"image": np.zeros((2, 2), np.uint8), "label": "a"},
            "data.label='label' is 'a', none of the 4 classes",
        ),
        (
            {"image": np.zeros((2, 2), np.uint8), "label": 0.5},
            "is not the number or name of a class (np.float64(0.5)); name another",
        ),
    ],
)
def test_what_is_no_image_is_named(sources, example, message):
    sources(m=[example])
    with pytest.raises(DataError, match=re.escape(message)):
        opened(config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "must be at least 1"),
        ({"channels": 2}, "must be 1 or 3"),
        ({"mean": (0.5, 0.5)}, "must be one number or 1, one a channel"),
        ({"std": ()}, "must be one number or 1, one a channel"),
        ({"std": (0.0,)}, "must be positive"),
        ({"crop": "center"}, "expected one of none, pad, resized"),
        ({"pad": -1}, "must be at least 0"),
        ({"rand_augment": -1}, "must be at least 0; 0 is off"),
        ({"rand_magnitude": 11.0}, "must lie in [0, 10]"),
        ({"mixup": -0.1}, "must be at least 0; 0 is off"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    (name, value), *_ = fields.items()
    with pytest.raises(
        ValueError, match=re.escape(f"data.{name}={value!r}: {message}")
    ):
        config(**fields).validate()
