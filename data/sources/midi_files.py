"""A folder of MIDI files as a source: one piece a file."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from triform.data.music import Music, library
from triform.data.sources import indexes
from triform.data.sources.base import Reading
from triform.data.sources.digests import digests
from triform.data.sources.division import Divided
from triform.data.sources.locate import Found

VERSION = "1"  # of how files are read; another one makes other cache entries


class Pieces(Sequence):
    """The pieces of a split, read when asked for."""

    def __init__(self, source: "MidiSource", numbers: np.ndarray):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, item: int) -> dict[str, Any]:
        path = self._source.paths[int(self._numbers[item])]
        return Music.of_midi(path).example()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[item] for item in range(len(self)))


class MidiSource(Divided):
    """One example a file: notes, length, resolution and tempi (data/music.py)."""

    noun = "pieces"

    def __init__(self, name: str, found: Found, reading: Reading):
        library()  # says at once if it is missing
        self.name, self.found, self.reading = name, found, reading
        self.paths = [file.paths[0] for file in found.midi]

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """Of the content of every file."""
        keyed = (
            hashlib.blake2b(digest.encode(), digest_size=8, key=indexes.KEY).digest()
            for digest in self._digests
        )
        return np.array([int.from_bytes(x) for x in keyed], np.uint64)

    @functools.cached_property
    def _digests(self) -> list[str]:
        return digests(self.paths, self.reading.cache)

    def runs(self) -> list[tuple[str, int]]:
        """(split, 1) of every file."""
        return [(file.split, 1) for file in self.found.midi]

    def examples(self, split: str) -> Pieces:
        """The pieces of a split, a slice of one, or a sum of such."""
        return Pieces(self, self.numbers(split))

    def column(self, split: str, feature: str) -> list:
        """The values of one feature."""
        return [example[feature] for example in self.examples(split)]

    def classes(self, feature: str) -> tuple[str, ...]:
        """None is named."""
        return ()

    def fingerprint(self, split: str) -> str:
        """Contents of the files of a split; not where they are."""
        known = [self._digests[i] for i in self.numbers(split).tolist()]
        digest = hashlib.sha256(repr((VERSION, split, known)).encode()).hexdigest()
        return f"midi-{digest[:32]}"

    def location(self) -> str:
        """Their folder."""
        return self.found.root

    def where(self, split: str, item: int) -> str:
        """The file's path."""
        return self.paths[int(self.numbers(split)[item])]
