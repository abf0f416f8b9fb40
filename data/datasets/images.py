"""Images and the class of each."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from triform.data import store
from triform.data.codecs.text import Tokenizer
from triform.data.datasets import augment
from triform.data.datasets.base import Batch, DataConfig, Dataset, Epoch, Limits
from triform.runtime.errors import DataError

CROPS = ("none", "pad", "resized")


@dataclasses.dataclass
class ImagesConfig(DataConfig):
    """Square images; what is random is so in training only."""

    image: str = "image"  # the feature that is read, uint8 [h, w, c]
    label: str = "label"  # the feature that is predicted, the number of a class
    size: int = 224  # pixels a side
    channels: int = 3  # 1: grey
    mean: tuple[float, ...] = (0.5,)  # of pixels in [0, 1]: one, or one a channel
    std: tuple[float, ...] = (0.5,)
    # none: the whole image, resized; pad: the same, moved by up to `pad` pixels;
    # resized: a random part, resized, and the middle 7/8 in evaluation.
    crop: str = "none"
    pad: int = 4
    flip: bool = False  # left and right, every other time
    rand_augment: int = 0  # operations (Cubuk et al. 2020)
    rand_magnitude: float = 9.0  # of 10
    mixup: float = 0.0  # alpha of Zhang et al. 2018, 2; 0: off

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(self.size >= 1, "size", "must be at least 1")
        self.require(self.channels in (1, 3), "channels", "must be 1 or 3")
        many = f"must be one number or {self.channels}, one a channel"
        self.require(len(self.mean) in (1, self.channels), "mean", many)
        self.require(len(self.std) in (1, self.channels), "std", many)
        self.require(min(self.std) > 0, "std", "must be positive")
        self.require(self.crop in CROPS, "crop", f"expected one of {', '.join(CROPS)}")
        self.require(self.pad >= 0, "pad", "must be at least 0")
        self.require(
            self.rand_augment >= 0, "rand_augment", "must be at least 0; 0 is off"
        )
        self.require(
            0 <= self.rand_magnitude <= 10, "rand_magnitude", "must lie in [0, 10]"
        )
        self.require(self.mixup >= 0, "mixup", "must be at least 0; 0 is off")


class Images(Dataset):
    """Row: an image, normalised, and its label, a distribution if images are mixed."""

    unit = "images"

    def __init__(self, config: Any, split: str, tok: Tokenizer | None, limits: Limits):
        super().__init__(config, split, tok, limits)
        self._raw = store.examples(config, config.source, split)
        self.sizes = np.zeros(len(self._raw), np.int64)  # they have no places
        keys = [config.image, config.label]
        folder = store.cached(
            config, "images", config.source, split, keys, self._write_cache
        )
        self.digest = os.path.basename(folder)
        self._pixels = None
        if os.listdir(folder):
            self._pixels = np.load(os.path.join(folder, "images.npy"), mmap_mode="r")
            self._labels = np.load(os.path.join(folder, "labels.npy"))
        # x / 255 normalised is x * scale + shift.
        mean, std = np.float32(config.mean), np.float32(config.std)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    @staticmethod
    def empty(config: Any, rows: int, length: int, limits: Limits) -> Batch:
        """Every key of a batch, zero."""
        image = np.zeros((rows, config.size, config.size, config.channels), np.float32)
        shape = (rows, limits["label"]) if config.mixup else (rows,)
        label = np.zeros(shape, np.float32 if config.mixup else np.int32)
        weights = np.zeros(rows, np.float32)
        return {"image": image, "label": label, "label_weights": weights}

    def _write_cache(self, folder: str) -> None:
        """All images in one array; nothing if their shapes differ."""
        labels, array = [], None
        path = os.path.join(folder, "images.npy")
        for i, example in enumerate(tqdm(self._raw, disable=None, leave=False)):
            image, label = self._read(example)
            if array is None:
                shape = (len(self._raw), *image.shape)
                array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            if image.shape != array.shape[1:]:
                os.remove(path)
                return
            array[i] = image
            labels.append(label)
        array.flush()
        np.save(os.path.join(folder, "labels.npy"), labels)

    def _read(self, example: Mapping[str, Any]) -> tuple[np.ndarray, int]:
        config, values = self.config, []
        for field in ("image", "label"):
            name = getattr(config, field)
            if name not in example:
                raise DataError(
                    f"data.{field}: {config.source!r} has no feature {name!r}; "
                    f"expected one of {', '.join(sorted(example))}"
                )
            values.append(np.asarray(example[name]))
        image, label = values
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise DataError(
                f"data.image: feature {config.image!r} of {config.source!r} is no "
                f"uint8 image ({image.dtype} {image.shape}); name an image feature"
            )
        if label.ndim or not np.issubdtype(label.dtype, np.integer):
            raise DataError(
                f"data.label: feature {config.label!r} of {config.source!r} is not the "
                f"number of a class ({example[config.label]!r:.40}); name another"
            )
        return image, int(label)

    def _example(self, item: int, epoch: Epoch, rng: Any) -> tuple[np.ndarray, int]:
        """An image, uint8 [size, size, channels], and its label."""
        config = self.config
        if self._pixels is None:
            image, label = self._read(self._raw[item])
        else:
            image, label = self._pixels[item], self._labels[item]
        image, box = augment.with_channels(image, config.channels), None
        if config.crop == "resized":
            box = (
                augment.random_box(*image.shape[:2], rng)
                if epoch.train
                else augment.central_box(*image.shape[:2], 7 / 8)
            )
        image = augment.resized(image, config.size, box)
        if not epoch.train:
            return image, label
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
        batch["label_weights"][row] = 1
        if not mixup:
            batch["label"][row] = label
        elif not epoch.train:
            batch["label"][row, self._known(label, item)] = 1
        else:
            share, other = np.float32(rng.beta(mixup, mixup)), self._draw(rng)
            second, second_label = self._example(other, epoch, rng)
            image = share * image + (1 - share) * second
            batch["label"][row, self._known(label, item)] += share
            batch["label"][row, self._known(second_label, other)] += 1 - share
        np.add(image * self._scale, self._shift, out=batch["image"][row])

    def _draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self.sizes)))

    def _known(self, label: int, item: int) -> int:
        if not 0 <= label < self.limits["label"]:
            raise DataError(
                f"{self.describe(item)}: label {label} is outside the "
                f"{self.limits['label']} classes of the model; raise model.num_labels"
            )
        return label

    def real(self, batch: Batch) -> int:
        """Images that are no padding."""
        return int(batch["label_weights"].sum())

    def preview(self, batch: Batch, tok: Tokenizer | None) -> str:
        """The first image as shades, 32 characters wide at most, and its label."""
        image = batch["image"][0].mean(-1)
        step = -(-len(image) // 32)
        image = image[:: 2 * step, ::step]  # a character is twice as high as wide
        shades = (image - image.min()) / max(float(np.ptp(image)), 1e-6) * 7.99
        rows = ["".join(" .:-=+*#"[int(x)] for x in row) for row in shades]
        label = batch["label"][0]
        shown = np.argmax(label) if np.ndim(label) else label
        return "\n".join([*(f"  {row}" for row in rows), f"  label {shown}"])
