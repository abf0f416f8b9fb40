"""Pictures as a source: in folders by class, or described by a table beside them."""

import concurrent.futures
import functools
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from triform.data import progress
from triform.data.sources import formats, indexes, locate
from triform.data.sources.base import LABEL, Column, Reading
from triform.data.sources.digests import digests
from triform.data.sources.division import Divided
from triform.data.sources.formats import File
from triform.runtime.errors import DataError

IMAGE, FILE_NAME = "image", "file_name"
VERSION = "1"  # of how pictures are decoded; another one makes other cache entries


def content_of(value: Any) -> bytes | None:
    """The bytes of a file that a table has inside; None of what is no such cell.

    They stand alone or, as `datasets` writes them, beside a path.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def decoded(path: str, content: bytes | None = None) -> np.ndarray:
    """uint8 [h, w, 1 or 3]: upright, transparent parts white, of several frames the
    first; DataError names a file that is none.

    With `content` these bytes are decoded, and `path` is for messages.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
                return eight_bits(upright, path)
    except DataError:
        raise
    except Exception as error:  # its decoders raise whatever they like
        if isinstance(error, OSError) and error.errno:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); check path and rights"
            ) from error
        raise DataError(
            f"{path}: is torn or no picture ({' '.join(str(error).split()):.200}); "
            "replace or remove it"
        ) from error


def eight_bits(image: Image.Image, path: str) -> np.ndarray:
    """Grey with one channel, everything else as red, green and blue."""
    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise DataError(
                f"{path}: has values outside [0, 65535]; save it with 8 or 16 bits"
            )
        return (wide >> 8).astype(np.uint8)[..., None]
    if image.mode == "F":
        raise DataError(f"{path}: holds floating-point values; save it with 8 bits")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    grey = image.mode in ("LA", "La")
    if image.has_transparency_data or grey:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("L" if grey else "RGB")
    array = np.asarray(image)
    return array[..., None] if grey else array


class Pictures(Sequence):
    """The examples of a split, decoded when asked for."""

    def __init__(self, source: "PictureSource", numbers: np.ndarray):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self._source.example(int(self._numbers[item]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[item] for item in range(len(self)))


class PictureSource(Divided):
    """Base: one example a picture, with what is known of it."""

    noun = "pictures"
    rows: list[tuple[str, dict[str, Any]]]  # (where, what is known of it) of every one
    contents: Sequence[str]  # a digest of every one

    def __init__(self, name: str, found: locate.Found, reading: Reading):
        self.name, self.found, self.reading = name, found, reading

    def example(self, number: int) -> dict[str, Any]:
        """The picture, uint8 [h, w, c], with what is known of it."""
        raise NotImplementedError

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """Of the content of every picture's file."""
        keyed = (
            hashlib.blake2b(digest.encode(), digest_size=8, key=indexes.KEY).digest()
            for digest in self.contents
        )
        found = [int.from_bytes(x) for x in keyed]
        return np.array(found, np.uint64)

    def examples(self, split: str) -> Pictures:
        """The pictures of a split, a slice of one, or a sum of such."""
        return Pictures(self, self.numbers(split))

    def column(self, split: str, feature: str) -> list:
        """The values of one column, without decoding pictures."""
        return [self.rows[i][1][feature] for i in self.numbers(split).tolist()]

    def classes(self, feature: str) -> tuple[str, ...]:
        """The labels of the training pictures, or the numbers up to their largest."""
        split = "train" if "train" in self.members else "all"
        if feature not in self.rows[0][1]:
            return ()
        values = self.column(split, feature)
        if all(isinstance(x, str) for x in values):
            return tuple(sorted(set(values)))
        if all(isinstance(x, int) for x in values):
            return tuple(map(str, range(max(values) + 1)))
        return ()

    def fingerprint(self, split: str) -> str:
        """Contents and labels of the pictures of a split; not where they are."""
        known = [
            (self.contents[i], sorted(self.rows[i][1].items()))
            for i in self.numbers(split).tolist()
        ]
        digest = hashlib.sha256(repr((VERSION, split, known)).encode()).hexdigest()
        return f"pictures-{digest[:32]}"

    def where(self, split: str, item: int) -> str:
        """The picture's path, or its place in a table."""
        return self.rows[int(self.numbers(split)[item])][0]


class FolderPictures(PictureSource):
    """Files: `image`, and `label`, the folder it is in, or the columns of metadata.csv
    or .jsonl.
    """

    @functools.cached_property
    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(path, what is known of it) of every picture; each has been decoded once."""
        rows = self._described() if self.found.files else self._in_folders()
        self._decode_all([path for path, _ in rows])
        return rows

    @functools.cached_property
    def contents(self) -> list[str]:
        """Of the files."""
        return digests([path for path, _ in self.rows], self.reading.cache)

    def example(self, number: int) -> dict[str, Any]:
        """The picture, decoded now, with what is known of it."""
        path, values = self.rows[number]
        return {IMAGE: decoded(path), **values}

    def runs(self) -> list[tuple[str, int]]:
        """(split, 1) of every picture."""
        splits = {file.paths[0]: file.split for file in self.found.pictures}
        return [(splits[path], 1) for path, _ in self.rows]

    def location(self) -> str:
        """Their folder."""
        return self.found.root

    def _in_folders(self) -> list[tuple[str, dict[str, Any]]]:
        """The label is the first folder, or that in the folder of a split."""
        rows = []
        for file in self.found.pictures:
            (path,) = file.paths
            *folders, _ = os.path.relpath(path, self.found.root).split(os.sep)
            if folders and locate.SPLITS.get(folders[0].lower()) == file.split:
                folders = folders[1:]
            rows.append((path, {LABEL: folders[0]} if folders else {}))
        labelled = [row for row in rows if row[1]]
        if labelled and len(labelled) < len(rows):
            bare = next(path for path, known in rows if not known)
            raise DataError(
                f"{bare}: lies in no folder of a class, and {labelled[0][0]} does; "
                "move it into one"
            )
        return rows

    def _described(self) -> list[tuple[str, dict[str, Any]]]:
        """In the order of the tables; every picture must have a row."""
        known = {file.paths[0] for file in self.found.pictures}
        rows, labels = {}, {}
        for table in self.found.files:
            for row in formats.rows(table):
                values = dict(row.values)
                path = self._named(values.pop(FILE_NAME, None), table, row.number)
                if path not in known or path in rows:
                    rule = "comes twice" if path in rows else "is no picture there"
                    raise DataError(
                        f"{table.where(row.number)}: {path} {rule}; correct the row"
                    )
                for name, value in values.items():
                    column = Column(LABEL, name, LABEL)
                    labels.setdefault(name, indexes.Labels(column)).add(
                        value, row, table
                    )
                rows[path] = values
        if bare := sorted(known - rows.keys()):
            raise DataError(
                f"{bare[0]}: {self.found.files[0].name} has no row for it; add one or "
                "move it away"
            )
        return [
            (path, {k: indexes.converted(x, labels[k].kind()) for k, x in row.items()})
            for path, row in rows.items()
        ]

    def _named(self, name: Any, table: File, number: int) -> str:
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{table.where(number)}: has no {FILE_NAME}; that column names the "
                "picture, relative to the table"
            )
        folder = os.path.dirname(table.paths[0])
        return os.path.normpath(os.path.join(folder, name))

    def _decode_all(self, listed: list[str]) -> None:
        """DataError for the first that cannot be decoded; once for the same files."""
        facts = repr((VERSION, digests(listed, self.reading.cache)))
        name = f"decoded-{hashlib.sha256(facts.encode()).hexdigest()[:32]}"
        mark = os.path.join(self.reading.cache, name) if self.reading.cache else ""
        if mark and os.path.exists(mark):
            return
        decode_all(decoded, listed, len(listed))
        if mark:
            os.makedirs(self.reading.cache, exist_ok=True)
            with open(mark, "w"):
                pass


def decode_all(
    decode: Callable[[Any], np.ndarray], items: Iterable, total: int
) -> None:
    """Decodes all of them, on all cores; raises what the first that fails raises."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        shapes = pool.map(lambda item: decode(item).shape, items)
        for _ in progress.counted(shapes, "looking at pictures", total):
            pass
