"""Pictures inside tables as a source: Parquet and Arrow files, as of `datasets`.

Their bytes are copied into one file of the cache, where any picture is found at once: a
Parquet file can only be read by some thousand rows.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from typing import Any

import numpy as np

from triform.data import progress
from triform.data.sources import formats, indexes, pictures
from triform.data.sources.base import LABEL, PICTURE, TEXT, Reading
from triform.data.sources.digests import digests
from triform.data.sources.formats import File, Row
from triform.data.sources.locate import Found
from triform.data.sources.pictures import PictureSource
from triform.runtime import files
from triform.runtime.errors import DataError


@dataclasses.dataclass
class _Kept:
    """What is in the cache."""

    cells: np.ndarray  # uint8: the bytes of all pictures, one after another
    offsets: np.ndarray  # int64 [N + 1]
    contents: list[str]  # digests [N]
    numbers: np.ndarray  # int64 [N]: of the rows in their files
    counts: list[int]  # rows of every file
    values: list[dict[str, Any]]  # [N]: the columns that are read, but for the picture


class TablePictures(PictureSource):
    """The column of a config that is a picture, and those beside it that it reads."""

    def __init__(self, name: str, found: Found, reading: Reading):
        super().__init__(name, found, reading)
        self.columns = [c for c in reading.columns if c.kind != PICTURE]
        self.picture = next(c for c in reading.columns if c.kind == PICTURE)

    @functools.cached_property
    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(file and row, what is known of it) of every picture."""
        kept, named = self._kept, iter(self._kept.numbers.tolist())
        where = [
            file.where(next(named))
            for file, count in zip(self.found.files, kept.counts, strict=True)
            for _ in range(count)
        ]
        return list(zip(where, kept.values, strict=True))

    @property
    def contents(self) -> list[str]:
        """Of the pictures' bytes."""
        return self._kept.contents

    def example(self, number: int) -> dict[str, Any]:
        """The picture, decoded now, with what is known of it."""
        where, values = self.rows[number]
        return {self.picture.name: _decoded(self._kept, number, where), **values}

    def classes(self, feature: str) -> tuple[str, ...]:
        """The names that Arrow files written by `datasets` give, else as in folders."""
        return self._classes.get(feature, ()) or super().classes(feature)

    def runs(self) -> list[tuple[str, int]]:
        """(split, number of rows) of one file after another."""
        names = [file.split for file in self.found.files]
        return list(zip(names, self._kept.counts, strict=True))

    def location(self) -> str:
        """The files."""
        return formats.listed(self.found.files)

    @functools.cached_property
    def _classes(self) -> dict[str, tuple[str, ...]]:
        return formats.classes(self.found.files)

    @functools.cached_property
    def _kept(self) -> _Kept:
        """From the cache, or copied into it: once for every content."""
        folder = self.reading.cache or self._folder.name
        listed = [path for file in self.found.files for path in file.paths]
        facts = digests(listed, self.reading.cache), self.reading.columns
        key = hashlib.sha256(repr((pictures.VERSION, facts)).encode()).hexdigest()[:32]
        cells, index = (
            os.path.join(folder, f"pictures-{key}{end}") for end in (".bin", ".npz")
        )
        if not os.path.exists(index):
            os.makedirs(folder, exist_ok=True)
            self._copy(cells, index)
        with np.load(index) as found:
            values = json.loads(str(found["values"]))
            return _Kept(
                np.asarray(np.memmap(cells, np.uint8, "r")),
                found["offsets"],
                found["contents"].tolist(),
                found["numbers"],
                found["counts"].tolist(),
                values,
            )

    @functools.cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        """In place of a cache."""
        return tempfile.TemporaryDirectory(prefix="triform-")

    def _copy(self, cells: str, index: str) -> None:
        """Writes both; DataError for the first row that cannot be used."""
        offsets, contents, numbers, counts, values = [0], [], [], [], []
        labels = {c.name: indexes.Labels(c) for c in self.columns if c.kind == LABEL}
        with (
            files.replacing(cells, binary=True) as f,
            progress.Bar("reading files", unit="rows") as bar,
        ):
            for file in self.found.files:
                for row in formats.rows(file):
                    content = self._cell(row, file)
                    f.write(content)
                    offsets.append(offsets[-1] + len(content))
                    contents.append(
                        hashlib.blake2b(content, digest_size=16).hexdigest()
                    )
                    numbers.append(row.number)
                    values.append(self._values(row, file, labels))
                    bar.update()
                counts.append(len(numbers) - sum(counts))
        for known in values:
            for name, found in labels.items():
                known[name] = indexes.converted(known[name], found.kind())
        kept = _Kept(
            np.asarray(np.memmap(cells, np.uint8, "r")) if contents else np.zeros(0),
            np.array(offsets),
            contents,
            np.array(numbers),
            counts,
            values,
        )
        self._check(kept)
        with files.replacing(index, binary=True) as f:
            arrays = {k: getattr(kept, k) for k in ("offsets", "numbers", "counts")}
            np.savez(f, contents=contents, values=json.dumps(values), **arrays)

    def _check(self, kept: _Kept) -> None:
        """Decodes all pictures once."""
        if not kept.contents:
            raise DataError(f"{self.name}: holds no {self.noun}; put data there")
        which = np.repeat(np.arange(len(kept.counts)), kept.counts)

        def decode(number: int) -> np.ndarray:
            file = self.found.files[which[number]]
            return _decoded(kept, number, file.where(int(kept.numbers[number])))

        pictures.decode_all(decode, range(len(which)), len(which))

    def _cell(self, row: Row, file: File) -> bytes:
        indexes.check_columns(self.reading.columns, row, file)
        value = row.values[self.picture.name]
        content = pictures.content_of(value)
        if content is None:
            raise DataError(
                f"{file.where(row.number)}: data.{self.picture.key}="
                f"{self.picture.name!r} is {value!r:.40}, not the bytes of a picture; "
                "name another column, or name files in a metadata.csv that lies beside "
                "them"
            )
        return content

    def _values(
        self, row: Row, file: File, labels: dict[str, indexes.Labels]
    ) -> dict[str, Any]:
        """Texts and labels of a row."""
        found = {}
        for column in self.columns:
            value = row.values[column.name]
            if column.kind == TEXT:
                about = column.name, value, self.columns, self._classes
                if type(value) is not str:
                    indexes.check_text(*about, row, file)
                value = indexes.cleaned(value)
            else:
                labels[column.name].add(value, row, file)
            found[column.name] = value
        return found


def _decoded(kept: _Kept, number: int, where: str) -> np.ndarray:
    start, stop = kept.offsets[number : number + 2]
    return pictures.decoded(where, kept.cells[start:stop].tobytes())
