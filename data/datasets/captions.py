"""Pictures with captions: as tokens and pixels, or as tokens and codes."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Field, Shape, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.classes import Classes
from triform.data.datasets import augment
from triform.data.datasets.base import Dataset, Epoch, TextConfig
from triform.data.datasets.images import opened, pixels, scaling
from triform.data.datasets.requests import Item, Requests, as_text
from triform.data.progress import Bar
from triform.data.sources import PICTURE, Column
from triform.data.store import Feature
from triform.runtime import paths
from triform.runtime.errors import DataError


@dataclasses.dataclass
class CaptionsConfig(TextConfig):
    """What the two kinds share."""

    max_len: int = 16  # positions of a caption; longer ones are shortened
    image: str = "image"  # the feature that is read, uint8 [h, w, c]
    text: str = "text"  # the feature: the caption

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        return (Feature("text", self.source, self.text),)

    def columns(self) -> tuple[Column, ...]:
        """The image."""
        return (Column("image", self.image, PICTURE),)

    def rows(self, shape: Shape) -> int:
        """All rows have one length."""
        return self.batch_size

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(not self.buckets, "buckets", "must be (): rows have one length")


@dataclasses.dataclass
class CaptionedImagesConfig(CaptionsConfig):
    """A caption and a square image."""

    EXPECTED: ClassVar[tuple[str, ...]] = ("mean", "std", "resample")

    size: int = 224  # pixels a side
    channels: int = 3  # 1: grey
    mean: tuple[float, ...] = (0.5,)  # of pixels in [0, 1]: one, or one a channel
    std: tuple[float, ...] = (0.5,)  # of pixels, likewise
    resample: str = "bilinear"  # how another size is computed: augment.RESAMPLES

    def spec(self) -> Spec:
        """Tokens, images, and which rows are real."""
        return {
            "inputs": Field("BL", below="vocab_size", counts="segments"),
            "segments": Field("BL"),
            "image": Field("BHWC", "float32"),
            "row_weights": Field("B", "float32"),
        }

    def shapes(self) -> tuple[Shape, ...]:
        """One."""
        pixels = {"H": self.size, "W": self.size, "C": self.channels}
        return ({"L": self.max_len, **pixels},)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        augment.check_pixels(self)


@dataclasses.dataclass
class ImageCodesConfig(CaptionsConfig):
    """A caption and the codes of an image, which the model of another run gives."""

    max_len: int = 16  # positions of a caption, the start among them
    codes: str = ""  # the workdir of a discrete VAE
    grid: int = 0  # codes a side, as that run has them
    # Share of captions that are left out in training: what guidance needs. 1: always,
    # also in evaluation, a model of pictures alone.
    text_dropout: float = 0.1
    # Share of a caption's tokens that are left out in training, each by itself: of few
    # pictures a model learns which one has a name, not what its words mean.
    token_dropout: float = 0.0
    flip: bool = False  # in training, every other time the codes of the mirrored image

    def spec(self) -> Spec:
        """Tokens and codes, and which positions are real."""
        return {
            "text": Field("BS", below="vocab_size", counts="text_segments"),
            "text_segments": Field("BS"),
            "codes": Field("BL", below="num_codes", counts="code_weights"),
            "code_weights": Field("BL", "float32"),
        }

    def shapes(self) -> tuple[Shape, ...]:
        """One."""
        return ({"S": self.max_len, "L": self.grid**2},)

    def coded(self) -> dict[str, str]:
        """The codes."""
        return {"codes": "num_codes"}

    def make_absolute(self) -> None:
        """Makes paths absolute, so that the config means the same from any folder."""
        super().make_absolute()
        self.codes = self.codes and paths.absolute(self.codes)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        rule = "must lie in [0, 1]; 0: none is left out"
        for name in ("text_dropout", "token_dropout"):
            self.require(0 <= getattr(self, name) <= 1, name, rule)
        rule = "must be at least 1: the codes a side of the discrete VAE"
        self.require(self.grid >= 1, "grid", rule)


def read_image(dataset: Dataset, item: int) -> np.ndarray:
    """uint8 [h, w] or [h, w, c]; DataError with the example if it is no image."""
    config, example = dataset.config, dataset.example(item)
    if config.image not in example:
        raise DataError(
            f"data.image: {config.source!r} has no feature {config.image!r}; expected "
            f"one of {', '.join(sorted(example))}"
        )
    try:
        return pixels(example[config.image])
    except DataError as error:
        raise DataError(
            f"{dataset.describe(item)}: data.image={config.image!r}: {error}"
        ) from error


class Captions(Dataset):
    """Base: opens the captions."""

    truncates = True

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        self.store = store.open_store(config, split, self.tok, config.features())
        self.tokens = self.store.tokens["text"]
        self.sizes = {}
        self.empty = self.tokens.sizes() == 0

    def _cached(self, name: str, keys: Sequence[str], item: Any) -> np.ndarray:
        """An array of all examples, of which item(images) makes some rows."""
        config, total = self.config, len(self)

        def write(folder: str, parts: str) -> None:
            path, array = os.path.join(folder, f"{name}.npy"), None
            with Bar(f"{name.replace('_', ' ')} of images", total) as bar:
                for start in range(0, total, CHUNK):
                    stop = min(start + CHUNK, total)
                    rows = item([read_image(self, i) for i in range(start, stop)])
                    if array is None:
                        shape = (total, *rows.shape[1:])
                        array = np.lib.format.open_memmap(path, "w+", rows.dtype, shape)
                    array[start:stop] = rows
                    bar.update(stop - start)

        keys = [config.image, *keys]
        folder = store.cached(config, name, config.source, self.split, keys, write)
        self.digest = f"{self.store.digest}-{os.path.basename(folder)}"
        return np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r")

    def input_text(self, item: int) -> str:
        """The caption."""
        return self._texts(item)[0]


CHUNK = 256  # images that are prepared at once


class CaptionedImages(Captions):
    """Row: a caption that ends with EOS, and an image, normalised."""

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        keys = [str((config.size, config.channels, config.resample))]

        def prepared(images: list[np.ndarray]) -> np.ndarray:
            return np.stack([square(config, image) for image in images])

        self._pixels = self._cached("squares", keys, prepared)

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The caption, shortened to the row, and the image."""
        write_caption(batch, row, self.tokens[item], self.tok.eos)
        write_image(self.config, batch, row, self._pixels[item])


def write_caption(batch: Batch, row: int, ids: np.ndarray, end: int) -> None:
    """Tokens and an end."""
    ids = ids[: batch["inputs"].shape[1] - 1]
    batch["inputs"][row, : len(ids)], batch["inputs"][row, len(ids)] = ids, end
    batch["segments"][row, : len(ids) + 1] = 1


def write_image(config: Any, batch: Batch, row: int, image: np.ndarray) -> None:
    """An image uint8 [size, size, channels], normalised."""
    scale, shift = scaling(config)
    np.add(image * scale, shift, out=batch["image"][row])
    batch["row_weights"][row] = 1


def square(config: Any, image: np.ndarray) -> np.ndarray:
    """uint8 [size, size, channels] of an image uint8 [h, w] or [h, w, c]."""
    image = augment.with_channels(image, config.channels)
    return augment.resized(image, config.size, None, config.resample)


class Pairs(Requests):
    """Captions with pictures: {"text": ..., "image": path or array}."""

    columns, gives = ("text", "image"), ("score",)

    @classmethod
    def flags(cls, config: Any, classes: Mapping[str, Classes]) -> str:
        """With a tab between them, in quotes in which shells know it."""
        return r"--input=$'a caption\tpicture.png'"

    def read(self, request: Any) -> Item:
        """Tokens, and the image as a square."""
        (text, image), notes = self.values(request)
        ids = self.tok.encode_batch([as_text(text)])[0]
        return Item([ids, square(self.config, opened(image))], text, notes)

    def size(self, item: Item) -> int:
        """There is one shape."""
        return 0

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """As a row of the data."""
        ids, image = item.parts
        write_caption(batch, row, ids, self.tok.eos)
        write_image(self.config, batch, row, image)
        return max(0, len(ids) + 1 - self.config.max_len)

    def answer(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """How well both match."""
        return {"score": float(row["match"])}


CaptionedImages.requests = Pairs


def write_text(batch: Batch, row: int, ids: np.ndarray, start: int) -> int:
    """A start and tokens; how many are left out."""
    room = batch["text"].shape[1] - 1
    kept = ids[:room]
    batch["text"][row, 0], batch["text"][row, 1 : len(kept) + 1] = start, kept
    batch["text_segments"][row, : len(kept) + 1] = 1
    return len(ids) - len(kept)


class Prompts(Requests):
    """Captions of pictures that are wanted; with an image, its upper rows are kept."""

    columns, axis, gives = ("text", "image"), "S", ("image", "score")
    example = "a caption"

    @classmethod
    def flags(cls, config: Any, classes: Mapping[str, Classes]) -> str:
        """Images that are given back need a file."""
        return f"{super().flags(config, classes)} --output=out.png"

    def read(self, request: Any) -> Item:
        """Tokens, and the codes of the image if there is one."""
        image = None
        if isinstance(request, Mapping):
            image = request.get("image", request.get(self.config.image))
            (text, image), notes = self.values({**request, "image": image})
        else:
            (text, *_), notes = self.values({"text": request, "image": None})
        parts = [self.tok.encode_batch([as_text(text)])[0].astype(np.int32)]
        if image is not None:
            parts.append(self.codecs["codes"].encode([opened(image)])[0])
        return Item(parts, text, notes)

    def checked(self, item: Item) -> Item:
        """The same; the codes of an image are no ids of texts."""
        super().checked(Item(item.parts[:1]))
        return item

    def size(self, item: Item) -> int:
        """There is one shape."""
        return 0

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """The caption, and the codes of the image."""
        ids, *codes = item.parts
        if codes:
            batch["codes"][row] = codes[0]
            batch["code_weights"][row] = 1
        return write_text(batch, row, ids, self.tok.start)


class ImageCodes(Captions):
    """Row: a start and a caption, and the codes of an image, row by row.

    Codes are computed once, when a split is first opened.
    """

    requests = Prompts

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        codec = codecs["codes"]
        if codec.grid != config.grid:
            raise DataError(
                f"data.grid={config.grid}: {codec.name} has {codec.grid} codes a side; "
                "set it to that"
            )
        keys = [codec.digest()]

        def mirrored(images: list[np.ndarray]) -> np.ndarray:
            return codec.encode([image[:, ::-1] for image in images])

        self._mirrored = None
        if config.flip and split == config.train_split:
            self._mirrored = self._cached("mirrored_codes", keys, mirrored)
        self._codes = self._cached("codes", keys, codec.encode)

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """In training captions or parts of them are left out, and images mirrored."""
        ids, codes, config = self.tokens[item], self._codes, self.config
        if epoch.train:
            rng = epoch.rng(item)
            kept = rng.random() >= config.text_dropout
            if self._mirrored is not None and rng.random() < 0.5:
                codes = self._mirrored
            if config.token_dropout:
                ids = ids[rng.random(len(ids)) >= config.token_dropout]
        else:
            kept = config.text_dropout < 1
        write_text(batch, row, ids if kept else ids[:0], self.tok.start)
        batch["codes"][row], batch["code_weights"][row] = codes[item], 1

    def preview(self, batch: Batch) -> str:
        """The first row's caption and codes."""
        ids = batch["text"][0][batch["text_segments"][0] > 0]
        codes = " ".join(map(str, batch["codes"][0][:24].tolist()))
        return f"  text   {self.tok.show(ids)}\n  codes  {codes} ..."
