"""A user's own files as a source: texts, tables, aligned lines."""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from triform.data.sources import formats, indexes
from triform.data.sources.base import LABEL, TEXT, Reading
from triform.data.sources.digests import digests
from triform.data.sources.division import HELD_OUT, Divided
from triform.data.sources.formats import File
from triform.data.sources.indexes import Cursor, Index
from triform.data.sources.locate import TABLES, Found, suffix
from triform.runtime import paths

VERSION = "1"  # of how rows are read; another one makes other cache entries


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of a file: ('in.jsonl, line 3', {'text': 'words'}).

    Tables by their suffix, compressed or not (TABLES); of every other file each
    line is the text of a row, {'text': line}. DataError names file and line.
    """
    kind = TABLES.get(suffix(path), "line")
    file = File((paths.absolute(path),), kind)
    for row in formats.rows(file):
        yield file.where(row.number), row.values


class Rows(Sequence):
    """The examples of a split, read when asked for; fastest in ascending order."""

    def __init__(self, source: "FileSource", numbers: np.ndarray):
        self._source, self._numbers = source, numbers
        self._cursor = Cursor(source.files, source.index)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self._source.example(self._cursor, int(self._numbers[item]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        cursor = Cursor(self._source.files, self._source.index)
        for number in self._numbers.tolist():
            yield self._source.example(cursor, number)


class FileSource(Divided):
    """Rows of files."""

    def __init__(self, name: str, found: Found, reading: Reading):
        self.name, self.files, self.reading = name, found.files, reading
        self.columns = reading.columns
        if any(file.format == "file" for file in self.files):
            self.hint = "set data.txt_example=passage or line, "

    @functools.cached_property
    def index(self) -> Index:
        """What a pass over all files found, once for every content."""
        folder = self.reading.cache
        labels = sorted((c.name, c.divided) for c in self.columns if c.kind == LABEL)
        name = f"index-{self._digest(self.files, labels)}.npz"
        path = os.path.join(folder, name) if folder else ""
        found = Index.load(path) if path else None
        if found is None:
            found = indexes.scan(self.files, self.columns, self._classes)
            if path:
                os.makedirs(folder, exist_ok=True)
                found.save(path)
        return found

    @property
    def hashes(self) -> np.ndarray:
        """Of the texts of every row."""
        return self.index.hashes

    def runs(self) -> list[tuple[str, int]]:
        """(split, number of rows) of one file after another."""
        names = [file.split for file in self.files]
        return list(zip(names, np.diff(self.index.starts).tolist(), strict=True))

    def examples(self, split: str) -> Rows:
        """The rows of a split, a slice of one, or a sum of such."""
        return Rows(self, self.numbers(split))

    def column(self, split: str, feature: str) -> list:
        """The values of one column."""
        return [example[feature] for example in self.examples(split)]

    def classes(self, feature: str) -> tuple[str, ...]:
        """The names that Arrow files written by `datasets` give."""
        return self._classes.get(feature, ())

    def fingerprint(self, split: str) -> str:
        """Contents of the files that a split is from and how they are read; not where
        they are.
        """
        used, own = self.origins(split), {file.split for file in self.files}
        chosen = [file for file in self.files if file.split in used]
        missing = [name for name in HELD_OUT if name not in own]
        facts = (
            split,
            missing,
            self.reading.held_out,
            sorted(self.index.kinds.items()),
        )
        return f"files-{self._digest(chosen, facts)}"

    def location(self) -> str:
        """The files."""
        return formats.listed(self.files)

    def where(self, split: str, item: int) -> str:
        """'data.csv, line 7'."""
        file, row = Cursor(self.files, self.index)[int(self.numbers(split)[item])]
        return file.where(row.number)

    def report(self, split: str) -> list[str]:
        """Where splits come from; empty and equal examples."""
        empty = int(self.index.empty[self.numbers(split)].sum())
        lines = [f"examples with an empty text: {empty:,}"] if empty else []
        return [*super().report(split), *lines]

    def example(self, cursor: Cursor, number: int) -> dict[str, Any]:
        """A row with its texts and labels as they are everywhere."""
        _, row = cursor[number]
        values = row.values
        for column in self.columns:
            value = values[column.name]
            if column.kind == TEXT:
                values[column.name] = indexes.cleaned(value)
            else:
                kind, value = (
                    self.index.kinds[column.name],
                    indexes.divided(value, column),
                )
                values[column.name] = indexes.converted(value, kind)
        return values

    @functools.cached_property
    def _classes(self) -> Mapping[str, tuple[str, ...]]:
        return formats.classes(self.files)

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        """Path -> hash of the content."""
        listed = [path for file in self.files for path in file.paths]
        return dict(zip(listed, digests(listed, self.reading.cache), strict=True))

    def _digest(self, files: Sequence[File], more: Any) -> str:
        """Changes with the content of files, how rows are read, and `more`."""
        facts = [
            (f.format, f.columns, f.split, [self._digests[path] for path in f.paths])
            for f in files
        ]
        texts = sorted(c.name for c in self.columns if c.kind == TEXT)
        content = repr((VERSION, facts, texts, more))
        return hashlib.sha256(content.encode()).hexdigest()[:32]
