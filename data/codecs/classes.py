"""Names of classes <-> their numbers."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

PLACEHOLDER = "LABEL_{}"  # transformers' name of a class that has none


class Classes:
    """The classes of one field, in the order of their numbers."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.size = len(self.names)
        self._numbers = {name: i for i, name in enumerate(self.names)}
        folded = {name.casefold(): i for i, name in enumerate(self.names)}
        # "POSITIVE" is "positive", unless two classes differ by nothing else.
        self._folded = folded if len(folded) == self.size else {}

    @property
    def placeholders(self) -> bool:
        """Are the names those of classes that have none?"""
        return self.names == tuple(map(PLACEHOLDER.format, range(self.size)))

    @property
    def named(self) -> bool:
        """Do the names say more than the numbers?"""
        numerals = self.names == tuple(map(str, range(self.size)))
        return not (numerals or self.placeholders)

    def number(self, name: str) -> int:
        """Number of a class; -1 if there is none of that name."""
        return self._numbers.get(name, self._folded.get(name.casefold(), -1))

    def exact(self, names: Sequence[str]) -> np.ndarray:
        """int32 [N] of names, to the letter; -1 for what is no class."""
        return np.array([self._numbers.get(name, -1) for name in names], np.int32)

    def holds(self, names: Sequence[str]) -> bool:
        """Are all of these names of classes here?"""
        return all(self.number(name) >= 0 for name in names)

    def encode(self, values: Sequence, names: Sequence[str] = ()) -> np.ndarray:
        """int32 [N] of names or numbers [N]; -1 for what is no class.

        Where both have names, a number counts `names`, those of the data, and the class
        of the same name is meant. So it is if classes here are called by numbers that
        are in another order. Else it is the number of a class here.
        """
        values = np.asarray(values)
        if values.dtype.kind == "U":
            distinct, inverse = np.unique(values, return_inverse=True)
            texts = distinct.tolist()
            exact = [self._numbers.get(x, -1) for x in texts]
            if max(exact, default=-1) >= 0 or not texts:
                return np.array(exact, np.int32)[inverse]
            # A column that is written in another case, or holds numbers as text.
            if self.holds(texts):
                return np.array([self.number(x) for x in texts], np.int32)[inverse]
            if not all(map(str.isdecimal, texts)):
                return np.array(exact, np.int32)[inverse]
        # 1.0 is a class; 1.5, NaN and infinity are none.
        values = values.astype(np.float64)
        whole = (np.abs(values) < 2**31) & (values == np.floor(values))
        distinct, inverse = np.unique(
            np.where(whole, values, -1).astype(np.int64), return_inverse=True
        )
        ids = [self._meant(x, names) for x in distinct.tolist()]
        return np.array(ids, np.int32)[inverse]

    def _meant(self, number: int, names: Sequence[str]) -> int:
        """The class that a number of the data means; -1: none."""
        if number < 0:
            return -1
        given = tuple(names)
        if self.named and given != self.names:
            if given and Classes(given).named:
                return self.number(given[number]) if number < len(given) else -1
            if all(map(str.isdecimal, self.names)):
                return self.number(str(number))
        return number if number < self.size else -1

    def decode(self, ids: np.ndarray) -> list[str]:
        """The names of ids [N]."""
        return [self.names[int(i)] for i in ids]

    def digest(self) -> str:
        """Equal names have equal digests."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
