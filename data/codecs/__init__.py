"""Codecs: the values of one field of the data <-> ids."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Codec(Protocol):
    """What turns values into ids and back."""

    size: int  # number of ids

    def encode(self, values: Sequence[Any]) -> Any:
        """Ids of values."""
        ...

    def decode(self, ids: np.ndarray) -> Any:
        """The value of ids."""
        ...

    def digest(self) -> str:
        """Equal codecs have equal digests."""
        ...
