"""Names of classes <-> their numbers."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np


class Classes:
    """The classes of one field, in the order of their numbers."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.size = len(self.names)
        self._numbers = {name: i for i, name in enumerate(self.names)}

    def encode(self, values: Sequence) -> np.ndarray:
        """int32 [N] of names or numbers [N]; -1 for what is no class."""
        values = np.asarray(values)
        if values.dtype.kind == "U":
            distinct, inverse = np.unique(values, return_inverse=True)
            ids = [self._numbers.get(x, -1) for x in distinct.tolist()]
            return np.array(ids, np.int32)[inverse]
        # 1.0 is a class; 1.5, NaN and infinity are none.
        values = values.astype(np.float64)
        known = (values >= 0) & (values < self.size) & (values == np.floor(values))
        return np.where(known, values, -1).astype(np.int32)

    def decode(self, ids: np.ndarray) -> list[str]:
        """The names of ids [N]."""
        return [self.names[int(i)] for i in ids]

    def digest(self) -> str:
        """Equal names have equal digests."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
