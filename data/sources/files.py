"""A user's own files as a source: texts, tables, aligned lines."""

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from triform.data.sources import formats, indexes, locate
from triform.data.sources.base import Reading
from triform.data.sources.digests import digests
from triform.data.sources.formats import File
from triform.data.sources.indexes import Cursor, Index
from triform.runtime import paths
from triform.runtime.errors import DataError

VERSION = "1"  # of how rows are read; another one makes other cache entries
HELD_OUT = ("test", "validation")  # in the order in which hashes are given to them
ALL = "all"  # every example, whatever its split
SLICE = re.compile(r"([\w-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of a file: ('in.jsonl, line 3', {'text': 'words'}).

    Tables by their suffix, compressed or not (locate.TABLES); of every other file each
    line is the text of a row, {'text': line}. DataError names file and line.
    """
    kind = locate.TABLES.get(locate.suffix(path), "line")
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


class FileSource:
    """Rows of files by split.

    A file or folder called train, validation or test is that split. Where there is none
    for validation or test, a share of the training files is held out: rows whose texts
    have the lowest hashes. So equal texts are in one split, and a new row moves no
    other one.
    """

    def __init__(self, name: str, reading: Reading):
        self.name, self.reading = name, reading
        self.columns = reading.columns

    @functools.cached_property
    def files(self) -> tuple[File, ...]:
        """Its files, in order."""
        texts = [c.name for c in self.columns if c.is_text]
        return locate.find(self.name, self.reading.txt_example, texts).files

    @functools.cached_property
    def index(self) -> Index:
        """What a pass over all files found, once for every content."""
        folder = self.reading.cache
        key = self._digest(
            self.files, sorted(c.name for c in self.columns if not c.is_text)
        )
        path = os.path.join(folder, f"index-{key}.npz") if folder else ""
        found = Index.load(path) if path else None
        if found is None:
            found = indexes.scan(self.files, self.columns, self._classes)
            if path:
                os.makedirs(folder, exist_ok=True)
                found.save(path)
        return found

    def examples(self, split: str) -> Rows:
        """The rows of a split, a slice of one, or a sum of such."""
        return Rows(self, self._numbers(split))

    def splits(self) -> tuple[str, ...]:
        """Those of the files, those held out, and 'all'."""
        return (*self._members, ALL)

    def classes(self, feature: str) -> tuple[str, ...]:
        """The names that Arrow files written by `datasets` give."""
        return self._classes.get(feature, ())

    def fingerprint(self, split: str) -> str:
        """Contents of the files that a split is from and how they are read; not where
        they are.
        """
        names = {found[1] for part in split.split("+") if (found := SLICE.match(part))}
        own = {file.split for file in self.files}
        # What is held out comes from the training files, and so is missing in train.
        used = own if ALL in names else {n if n in own else "train" for n in names}
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
        first, *others = (file.name for file in self.files)
        return f"{first} and {len(others):,} more" if others else first

    def where(self, split: str, item: int) -> str:
        """'data.csv, line 7'."""
        number = int(self._numbers(split)[item])
        file, row = Cursor(self.files, self.index)[number]
        return file.where(row.number)

    def example(self, cursor: Cursor, number: int) -> dict[str, Any]:
        """A row with its texts and labels as they are everywhere."""
        _, row = cursor[number]
        values = row.values
        for column in self.columns:
            value = values[column.name]
            if column.is_text:
                values[column.name] = indexes.cleaned(value)
            else:
                kind = self.index.kinds[column.name]
                values[column.name] = indexes.converted(value, kind)
        return values

    def report(self, split: str) -> list[str]:
        """Where splits come from; empty and equal examples."""
        counts = {name: len(rows) for name, rows in self._members.items()}
        held = [name for name in counts if name not in {f.split for f in self.files}]
        lines = [
            f"{self.name}: {len(self.files):,} "
            f"{'files' if len(self.files) > 1 else 'file'}, "
            + ", ".join(f"{name} {n:,}" for name, n in counts.items())
            + " examples"
        ]
        if held:
            lines[0] += (
                f"; {' and '.join(held)} held out by content "
                f"(data.held_out={self.reading.held_out:g} each)"
            )
        rows = self._numbers(split)
        hashes = self.index.hashes[rows]
        if again := len(rows) - len(np.unique(hashes)):
            lines.append(f"{again:,} of the {len(rows):,} examples repeat another one")
        if empty := int(self.index.empty[rows].sum()):
            lines.append(f"{empty:,} are empty")
        for name, others in self._members.items():
            shared = np.isin(self.index.hashes[others], hashes).sum()
            if shared and not np.isin(others, rows).any():
                lines.append(f"{shared:,} of {name} are examples of {split}, too")
        return lines

    # Which rows

    @functools.cached_property
    def _classes(self) -> Mapping[str, tuple[str, ...]]:
        first = next((f for f in self.files if f.format == "arrow"), None)
        if first is None:
            return {}
        # Not at the top: pyarrow costs 0.2 s, which no other format needs.
        from triform.data.sources import arrow

        return arrow.classes(first.paths[0])

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
        texts = sorted(c.name for c in self.columns if c.is_text)
        content = repr((VERSION, facts, texts, more))
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    @functools.cached_property
    def _members(self) -> dict[str, np.ndarray]:
        """Split -> numbers of its rows, ascending."""
        names = [file.split for file in self.files]
        if not self.index.starts[-1]:
            raise DataError(f"{self.name}: holds no example; put data there")
        # Numbers of files by split, then of their rows.
        bounds = list(zip(self.index.starts[:-1], self.index.starts[1:], strict=True))
        found = {
            name: np.concatenate(
                [np.arange(*b) for b, n in zip(bounds, names, strict=True) if n == name]
            )
            for name in dict.fromkeys(names)
        }
        missing = [name for name in HELD_OUT if name not in found]
        if self.reading.held_out and missing and "train" in found:
            found |= self._held_out(found["train"], missing)
        order = ("train", "validation", "test", *found)
        return {name: found[name] for name in sorted(found, key=order.index)}

    def _held_out(
        self, rows: np.ndarray, missing: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The rows that go to every missing split, and those that stay.

        Hashes below a share of all hashes go to test, the next to validation. Of so few
        rows that none falls there, those of the lowest hash left go.
        """
        hashes = self.index.hashes[rows]
        distinct = np.unique(hashes)
        if len(distinct) <= len(missing):
            hint = ""
            if any(file.format == "file" for file in self.files):
                hint = "set data.txt_example=passage or line, "
            raise DataError(
                f"{self.name}: has {len(distinct)} different "
                f"{'example' if len(distinct) == 1 else 'examples'}, too few to hold "
                f"out {' and '.join(missing)}; {hint}add data, or set data.held_out=0 "
                "and data.eval_split=train"
            )
        share = int(self.reading.held_out * 2**64)
        taken = np.zeros(len(rows), bool)
        found = {}
        for i, name in enumerate(HELD_OUT):
            if name in missing:
                low, high = np.uint64(i * share), np.uint64((i + 1) * share)
                chosen = (hashes >= low) & (hashes < high) & ~taken
                if not chosen.any():
                    chosen = hashes == hashes[~taken].min()
                found[name], taken = rows[chosen], taken | chosen
        if taken.all():
            raise DataError(
                f"{self.name}: data.held_out={self.reading.held_out} leaves nothing to "
                "train on; lower it or add data"
            )
        return found | {"train": rows[~taken]}

    def _numbers(self, split: str) -> np.ndarray:
        """The rows of 'train', 'train[:90%]' or 'train+validation'."""
        parts = [self._part(part.strip(), split) for part in split.split("+")]
        rows = np.concatenate(parts)
        if not len(rows):
            raise DataError(
                f"{self.name}: split {split!r} has no examples; choose more"
            )
        return rows

    def _part(self, part: str, split: str) -> np.ndarray:
        found = SLICE.fullmatch(part)
        if not found or found[1] not in self.splits():
            hint = ""
            if found and found[1] in ("train", *HELD_OUT):
                hint = " (no file is named so, and data.held_out=0)"
            raise DataError(
                f"{self.name}: split {split!r}: expected one of "
                f"{', '.join(self.splits())}, or a slice such as train[:90%]{hint}"
            )
        name, *ends = found.groups()
        rows = self._members.get(name)
        if rows is None:  # all of them
            rows = np.arange(self.index.starts[-1])
        start, stop = (_bound(end, len(rows)) for end in ends)
        return rows[start:stop]


def _bound(end: str | None, size: int) -> int | None:
    """An end of a slice as a number of rows; percents are rounded as TFDS does."""
    if end is None or not end.endswith("%"):
        return None if end is None else int(end)
    return round(int(end[:-1]) * size / 100)
