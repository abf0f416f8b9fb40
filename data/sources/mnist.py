"""MNIST: 70,000 handwritten digits, grey, 28 by 28 pixels.

LeCun, Cortes and Burges 1998. CC BY-SA 3.0.
"""

import gzip
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from triform.data.sources.local_builder import TEXT, Download, LocalBuilder, Paths
from triform.data.sources.phrases import caption

Arrays = Mapping[str, list[np.ndarray]]  # split -> images, labels

NAME = "mnist.npz"
URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
STEMS = {"train": "train", "test": "t10k"}
KINDS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
# File -> (bytes, sha256), as TFDS records them.
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": (
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte.gz": (
        28_881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "t10k-images-idx3-ubyte.gz": (
        1_648_877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        4_542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}


class Mnist(LocalBuilder, skip_registration=True):
    """Images and labels in the official order: 60,000 and 10,000."""

    name = "mnist"
    VERSION = tfds.core.Version("2.0.0")  # 1.0.0 stored pixels as numbers
    folder = "mnist"
    origin = URL
    features: Mapping = {
        # Bytes are prepared in less than half the time of numbers; read-only arrays.
        "image": tfds.features.Tensor(
            shape=(28, 28, 1), dtype=np.uint8, encoding="bytes"
        ),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    files: Mapping[str, str] = {
        NAME: "39b9b1ffaa0ba4d8995a616551f0966941fe02a3fe79ba4a9db7373db16d53ad"
    }
    downloads: Mapping[str, Download] = {
        name: (URL + name, *facts) for name, facts in CHECKSUMS.items()
    }

    def examples(self, paths: Paths) -> Mapping[str, Iterator[dict]]:
        """Of the local copy's one file, or of the four originals."""
        with self.reading(NAME if NAME in paths else "an IDX file", "images of digits"):
            arrays = _archive(paths[NAME]) if NAME in paths else self._originals(paths)
            return {split: _digits(*pair) for split, pair in arrays.items()}

    def _originals(self, paths: Paths) -> Arrays:
        return {
            split: [self._idx(f"{stem}-{kind}", paths) for kind in KINDS]
            for split, stem in STEMS.items()
        }

    def _idx(self, name: str, paths: Paths) -> np.ndarray:
        """The array of an IDX file: a header of the number and sizes of its axes."""
        with self.reading(name, "a gzip-compressed IDX file"):
            content = gzip.decompress(pathlib.Path(paths[name]).read_bytes())
            axes = content[3]
            shape = np.frombuffer(content, ">i4", axes, 4)
            return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


class CaptionedMnist(Mnist, skip_registration=True):
    """The same with a caption of each: 'a handwritten seven'."""

    name = "captioned_mnist"
    VERSION = tfds.core.Version("1.0.0")
    features: Mapping = {**Mnist.features, "text": TEXT}

    def examples(self, paths: Paths) -> Mapping[str, Iterator[dict]]:
        """Which phrasing a picture has follows from its number."""

        def captioned(examples: Iterator[dict]) -> Iterator[dict]:
            for number, found in enumerate(examples):
                yield {**found, "text": caption(number, found["label"])}

        return {k: captioned(x) for k, x in super().examples(paths).items()}


def _archive(path: os.PathLike) -> Arrays:
    with np.load(path) as found:
        return {x: [found[f"{x}_images"], found[f"{x}_labels"]] for x in STEMS}


def _digits(images: np.ndarray, labels: np.ndarray) -> Iterator[dict]:
    """Examples; ValueError at once, not on the first, if the arrays are of others."""
    images = images.reshape(len(labels), 28, 28, 1)
    if images.dtype != np.uint8 or set(np.unique(labels)) - set(range(10)):
        raise ValueError("pixels must be uint8, labels 0 to 9")
    pairs = zip(images, labels.tolist(), strict=True)
    return ({"image": image, "label": label} for image, label in pairs)
