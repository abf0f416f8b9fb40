"""Which rows are in which split: by a file's name, else by a hash of the content."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from triform.data.sources.base import Reading
from triform.runtime.errors import DataError

HELD_OUT = ("test", "validation")  # in the order in which hashes are given to them
SCORED = {"test": "test_split", "validation": "eval_split"}  # keys of the config
ALL = "all"  # every row, whatever its split
SLICE = re.compile(r"([\w-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


class Divided:
    """Rows of files by split.

    A file or folder called train, validation or test is that split. Where there is none
    for validation or test, a share of the training files is held out: rows whose texts
    have the lowest hashes. So equal texts are in one split, and a new row moves no
    other one.
    """

    name: str
    reading: Reading
    hashes: np.ndarray  # uint64 [rows], of their content
    noun = "examples"
    hint = ""  # how to get more rows, ending in ', '

    def runs(self) -> Sequence[tuple[str, int]]:
        """(split, number of rows) of one file after another."""
        raise NotImplementedError

    def splits(self) -> tuple[str, ...]:
        """Those of the files, those held out, and 'all'."""
        return (*self.members, ALL)

    @functools.cached_property
    def members(self) -> dict[str, np.ndarray]:
        """Split -> numbers of its rows, ascending."""
        if not len(self.hashes):
            raise DataError(f"{self.name}: holds no {self.noun}; put data there")
        found: dict[str, list] = {}
        start = 0
        for split, count in self.runs():
            found.setdefault(split, []).append(np.arange(start, start + count))
            start += count
        members = {split: np.concatenate(rows) for split, rows in found.items()}
        missing = [name for name in HELD_OUT if name not in members]
        if self.reading.held_out and missing and "train" in members:
            members |= self._held_out(members["train"], missing)
        order = ("train", "validation", "test", *members)
        return {name: members[name] for name in sorted(members, key=order.index)}

    def numbers(self, split: str) -> np.ndarray:
        """The rows of 'train', 'train[:90%]' or 'train+validation'."""
        parts = [self._part(part.strip(), split) for part in split.split("+")]
        rows = np.concatenate(parts)
        if not len(rows):
            raise DataError(f"{self.name}: split {split!r} has no {self.noun}")
        return rows

    def origins(self, split: str) -> set[str]:
        """The splits whose files a split is from."""
        names = {found[1] for part in split.split("+") if (found := SLICE.match(part))}
        own = {name for name, _ in self.runs()}
        # What is held out comes from the training files, and so is missing in train.
        return own if ALL in names else {n if n in own else "train" for n in names}

    def held_out(self) -> list[str]:
        """The splits that have no files."""
        own = {name for name, _ in self.runs()}
        return [name for name in self.members if name not in own]

    def report(self, split: str) -> list[str]:
        """Where splits come from, and equal rows."""
        counts = ", ".join(f"{name} {len(x):,}" for name, x in self.members.items())
        lines = [f"{self.name}: {counts} {self.noun}"]
        if held := self.held_out():
            share = f"data.held_out={self.reading.held_out:g}"
            lines[0] += f"; {' and '.join(held)} by content, {share}"
        rows = self.numbers(split)
        hashes = self.hashes[rows]
        if again := len(rows) - len(np.unique(hashes)):
            lines.append(f"{again:,} of {len(rows):,} {self.noun} repeat another one")
        for name, others in self.members.items():
            shared = int(np.isin(self.hashes[others], hashes).sum())
            if shared and not np.isin(others, rows).any():
                lines.append(f"{shared:,} {self.noun} of {name} are in {split}, too")
        return lines

    def _held_out(
        self, rows: np.ndarray, missing: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The rows that go to every missing split, and those that stay.

        Hashes below a share of all hashes go to test, the next to validation. Of so few
        rows that none falls there, those of the lowest hash left go.
        """
        hashes = self.hashes[rows]
        distinct = len(np.unique(hashes))
        if distinct <= len(missing):
            keys = "".join(f", data.{SCORED[x]}=train" for x in missing)
            raise DataError(
                f"{self.name}: {distinct} different {self.noun} are too few to hold "
                f"out {' and '.join(missing)}; {self.hint}add data, or set "
                f"data.held_out=0{keys}"
            )
        share = int(self.reading.held_out * 2**64)
        taken, found = np.zeros(len(rows), bool), {}
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

    def _part(self, part: str, split: str) -> np.ndarray:
        found = SLICE.fullmatch(part)
        if not found or found[1] not in self.splits():
            hint = ""
            if found and found[1] in ("train", *HELD_OUT):
                hint = f"; no file or folder is called {found[1]}"
            raise DataError(
                f"{self.name}: split {split!r}: expected one of "
                f"{', '.join(self.splits())}, or a slice such as train[:90%]{hint}"
            )
        name, *ends = found.groups()
        rows = self.members.get(name)
        if rows is None:  # all of them
            rows = np.arange(len(self.hashes))
        start, stop = (_bound(end, len(rows)) for end in ends)
        return rows[start:stop]


def _bound(end: str | None, size: int) -> int | None:
    """An end of a slice as a number of rows; percents are rounded as TFDS does."""
    if end is None or not end.endswith("%"):
        return None if end is None else int(end)
    return round(int(end[:-1]) * size / 100)
