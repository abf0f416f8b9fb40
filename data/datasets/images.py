"""Images, and the class of each."""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from triform.data import store
from triform.data.batch import Batch, Field, Shape, Sizes, Spec, resolved, zeros
from triform.data.codecs import Codec
from triform.data.codecs.classes import Classes
from triform.data.datasets import augment
from triform.data.datasets.base import (
    EVALUATION,
    DataConfig,
    Dataset,
    Epoch,
    labels,
)
from triform.data.datasets.requests import Item, Requests
from triform.data.progress import counted
from triform.data.sources import LABEL, PICTURE, Column, pictures
from triform.runtime.errors import DataError

CROPS = ("none", "pad", "resized")


@dataclasses.dataclass
class ImagesConfig(DataConfig):
    """Square images; what is random is so in training only."""

    EXPECTED: ClassVar[tuple[str, ...]] = ("mean", "std", "resample")

    image: str = "image"  # the feature that is read, uint8 [h, w, c]
    # The feature that is predicted, the number of a class; empty: images alone.
    label: str = "label"
    size: int = 224  # pixels a side
    channels: int = 3  # 1: grey
    mean: tuple[float, ...] = (0.5,)  # of pixels in [0, 1]: one, or one a channel
    std: tuple[float, ...] = (0.5,)  # of pixels, likewise
    resample: str = "bilinear"  # how another size is computed: augment.RESAMPLES
    # none: all of the image, resized; pad: the same, moved by up to `pad` pixels;
    # resized: a random part, resized, and the middle 7/8 in evaluation.
    crop: str = "none"
    pad: int = 4  # pixels that crop="pad" moves an image by, at most
    flip: bool = False  # left and right, every other time
    rand_augment: int = 0  # operations (Cubuk et al. 2020)
    rand_magnitude: float = 9.0  # of 10
    mixup: float = 0.0  # alpha of Zhang et al. 2018, 2; 0: off

    def spec(self) -> Spec:
        """Images, and the class of each: a distribution if they are mixed."""
        if not self.label:
            return {
                "image": Field("BHWC", "float32", counts="image_weights"),
                "image_weights": Field("B", "float32"),
            }
        label = Field("B", below="num_labels")
        if self.mixup:
            label = Field("BV", "float32")
        return {
            "image": Field("BHWC", "float32", counts="label_weights"),
            "label": label,
            "label_weights": Field("B", "float32"),
        }

    def shapes(self) -> tuple[Shape, ...]:
        """One."""
        mixed = {"V": "num_labels"} if self.mixup else {}
        return ({"H": self.size, "W": self.size, "C": self.channels, **mixed},)

    def columns(self) -> tuple[Column, ...]:
        """The image, and the label if there is one."""
        label = [Column("label", self.label, LABEL)] if self.label else []
        return (Column("image", self.image, PICTURE), *label)

    def classes(self) -> dict[str, str]:
        """The label, if there is one."""
        return {"label": "num_labels"} if self.label else {}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        augment.check_pixels(self)
        self.require(self.crop in CROPS, "crop", f"expected one of {', '.join(CROPS)}")
        self.require(self.pad >= 0, "pad", "must be at least 0")
        self.require(
            self.rand_augment >= 0, "rand_augment", "must be at least 0; 0 is off"
        )
        self.require(
            0 <= self.rand_magnitude <= 10, "rand_magnitude", "must lie in [0, 10]"
        )
        self.require(self.mixup >= 0, "mixup", "must be at least 0; 0 is off")
        rule = "data.label='' leaves no labels to mix; set 0 or name a label"
        self.require(self.label != "" or not self.mixup, "mixup", rule)


class Pictures(Requests):
    """Paths or bytes of image files, as tables have them, Pillow's images, or arrays
    uint8 [h, w] or [h, w, c].
    """

    columns, gives = ("image",), ("label", "score", "probabilities")
    example = "picture.png"

    def __init__(self, config: Any, codecs: Mapping[str, Codec], sizes: Sizes):
        super().__init__(config, codecs, sizes)
        if not config.label:
            self.gives = ("image",)

    @classmethod
    def flags(cls, config: Any, classes: Mapping[str, Classes]) -> str:
        """Images that are given back need a file."""
        output = "" if config.label else " --output=out.png"
        return super().flags(config, classes) + output

    def read(self, request: Any) -> Item:
        """The image as it is in evaluation."""
        value = request
        if isinstance(request, Mapping):
            (value,), _ = self.values(request)
        if isinstance(value, str) and not value.strip():
            return Item([], value)
        shown = os.fspath(value) if isinstance(value, str | os.PathLike) else "image"
        return Item([in_evaluation(self.config, opened(value))], shown)

    def size(self, item: Item) -> int:
        """There is one shape."""
        return 0

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """Normalised."""
        scale, shift = scaling(self.config)
        for image in item.parts:
            np.add(image * scale, shift, out=batch["image"][row])
            batch[self.config.spec()["image"].counts][row] = 1
        return 0

    def answer(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Label and probabilities, or an image, uint8 [size, size, channels]."""
        if "image" in row:
            return {"image": to_pixels(self.config, row["image"])}
        return self.labelled(row)

    def limit(self) -> str:
        """The setting of the size."""
        return f"data.size={self.config.size}"


def pixels(image: Any) -> np.ndarray:
    """uint8 [h, w] or [h, w, c] of a Pillow image or an array; DataError if it is
    neither.
    """
    if isinstance(image, Image.Image):
        return pictures.eight_bits(ImageOps.exif_transpose(image), "image")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(
            f"{type(image).__name__} of {array.dtype} {array.shape} is no image; give "
            "uint8 [h, w] or [h, w, c]"
        )
    return array


def opened(image: Any) -> np.ndarray:
    """The same, or of a file: of its path, or of its bytes as tables have them."""
    if isinstance(image, str | os.PathLike):
        return pictures.decoded(os.fspath(image))
    content = pictures.content_of(image)
    return pixels(image) if content is None else pictures.decoded("image", content)


def scaling(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) of a config with mean and std: pixels of [0, 255] are normalised
    by x * scale + shift.
    """
    mean, std = np.float32(config.mean), np.float32(config.std)
    return 1 / (255 * std), -mean / std


def to_pixels(config: ImagesConfig, image: np.ndarray) -> np.ndarray:
    """uint8 of what is normalised."""
    scale, shift = scaling(config)
    return np.clip(np.rint((image - shift) / scale), 0, 255).astype(np.uint8)


def in_evaluation(config: ImagesConfig, image: np.ndarray) -> np.ndarray:
    """uint8 [size, size, channels] of an image uint8 [h, w] or [h, w, c]."""
    image, box = augment.with_channels(image, config.channels), None
    if config.crop == "resized":
        box = augment.central_box(*image.shape[:2], 7 / 8)
    return augment.resized(image, config.size, box, config.resample)


class Images(Dataset):
    """Row: an image, normalised, and its label, a distribution if images are mixed."""

    unit, requests = "images", Pictures

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        self.examples = store.examples(config, config.source, split)
        self.sizes, self.empty = {}, np.zeros(len(self.examples), bool)
        keys = [config.image, config.label]
        folder = store.cached(
            config, "images", config.source, split, keys, self._write_cache
        )
        self.digest = os.path.basename(folder)
        self._pixels, path = None, os.path.join(folder, "images.npy")
        if os.path.exists(path):
            self._pixels = np.load(path, mmap_mode="r")
        # All labels are looked at before the first step.
        self._labels = np.zeros(len(self.examples), np.int32)
        if config.label:
            values = np.load(os.path.join(folder, "labels.npy"))
            self._labels = labels(self, "label", values)
        self._scale, self._shift = scaling(config)

    def _write_cache(self, folder: str, parts: str) -> None:
        """All labels; all images in one array, if their shapes are the same."""
        array, config = None, self.config
        path = os.path.join(folder, "images.npy")
        total = len(self.examples)
        for i, example in enumerate(counted(self.examples, "reading images", total)):
            image = self._read(example)
            if array is None:
                shape = (len(self.examples), *image.shape)
                array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            if image.shape != array.shape[1:]:
                os.remove(path)
                break
            array[i] = image
        if config.label:
            source = store.origin(config, config.source)
            found = np.asarray(source.column(self.split, config.label))
            if found.ndim != 1 or found.dtype.kind not in "biuU":
                raise DataError(
                    f"data.label: feature {config.label!r} of {config.source!r} is not "
                    f"the number or name of a class ({found.flat[0]!r:.40}); name "
                    "another"
                )
            np.save(os.path.join(folder, "labels.npy"), found)

    def _read(self, example: Mapping[str, Any]) -> np.ndarray:
        config = self.config
        for field in ("image", "label") if config.label else ("image",):
            name = getattr(config, field)
            if name not in example:
                raise DataError(
                    f"data.{field}: {config.source!r} has no feature {name!r}; "
                    f"expected one of {', '.join(sorted(example))}"
                )
        image = np.asarray(example[config.image])
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise DataError(
                f"data.image: feature {config.image!r} of {config.source!r} is no "
                f"uint8 image ({image.dtype} {image.shape}); name an image feature"
            )
        return image

    def _example(self, item: int, epoch: Epoch, rng: Any) -> tuple[np.ndarray, int]:
        """An image, uint8 [size, size, channels], and its label."""
        config = self.config
        label = self._labels[item]
        if self._pixels is None:  # of several sizes
            image = self._read(self.examples[item])
        else:
            image = self._pixels[item]
        if not epoch.train:
            return in_evaluation(config, image), label
        image, box = augment.with_channels(image, config.channels), None
        if config.crop == "resized":
            box = augment.random_box(*image.shape[:2], rng)
        image = augment.resized(image, config.size, box, config.resample)
        if config.crop == "pad":
            image = augment.shifted(image, config.pad, rng)
        if config.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if config.rand_augment:
            image = augment.rand_augment(
                image, config.rand_augment, config.rand_magnitude, rng
            )
        return image, label

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """An image, or two of them mixed."""
        mixup = self.config.mixup
        rng = epoch.rng(item)
        image, label = self._example(item, epoch, rng)
        batch[self.spec["image"].counts][row] = 1
        if "label" in batch and not mixup:
            batch["label"][row] = label
        elif mixup and not epoch.train:
            batch["label"][row, label] = 1
        elif mixup:
            share, other = np.float32(rng.beta(mixup, mixup)), self._draw(rng)
            second, second_label = self._example(other, epoch, rng)
            image = share * image + (1 - share) * second
            batch["label"][row, label] += share
            batch["label"][row, second_label] += 1 - share
        np.add(image * self._scale, self._shift, out=batch["image"][row])

    def _draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self)))

    def example(self, item: int) -> Mapping[str, Any]:
        """The example as the source has it."""
        return self.examples[item]

    def truth(self, item: int) -> dict[str, Any]:
        """The name of its class, if it has one."""
        if not self.config.label:
            return {}
        return {"true_label": self.codecs["label"].names[self._labels[item]]}

    def preview(self, batch: Batch) -> str:
        """The first image as shades, 32 characters wide at most, and its label."""
        image = batch["image"][0].mean(-1)
        step = -(-len(image) // 32)
        image = image[:: 2 * step, ::step]  # a character is twice as high as wide
        shades = (image - image.min()) / max(float(np.ptp(image)), 1e-6) * 7.99
        rows = ["".join(" .:-=+*#"[int(x)] for x in row) for row in shades]
        lines = [f"  {row}" for row in rows]
        if "label" in batch:
            label = batch["label"][0]
            lines.append(f"  label {np.argmax(label) if np.ndim(label) else label}")
        return "\n".join(lines)

    def samples(
        self, items: Sequence[int], rows: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, bytes]:
        """A PNG: images in a row as a model reads them, below each what it gives."""
        given = [row["image"] for row in rows if "image" in row]
        if not given:
            return {}
        sizes = {"B": len(items), **resolved(self.config.shapes()[0], self.model_sizes)}
        batch = zeros(self.spec, sizes)
        for row, item in enumerate(items):
            self.write(batch, row, item, EVALUATION)
        grid = np.concatenate([np.hstack(batch["image"]), np.hstack(given)])
        file = io.BytesIO()
        image = augment.to_pillow(to_pixels(self.config, grid))
        image.save(file, "png")
        return {".png": file.getvalue()}
