"""1,797 handwritten digits of 8 by 8 pixels with captions, out of scikit-learn.

The test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998),
which scikit-learn ships: nothing is downloaded. Pixels of 0 to 16 become 0 to 255.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from triform.data.sources.phrases import caption
from triform.runtime.errors import DataError

VERSION = 1
SPLITS = ("train", "validation", "test")


def examples(split: str) -> Sequence[Mapping[str, Any]]:
    """{image uint8 [8, 8, 1], label, text} of a split, in the order of the original.

    Of 1,797 pictures 200 are for validation and 100 for test.
    """
    images, labels = _digits()
    numbers = np.arange(len(labels))
    part = numbers[_part(numbers) == SPLITS.index(split)]
    return [
        {"image": images[i], "label": int(labels[i]), "text": caption(i, labels[i])}
        for i in part.tolist()
    ]


def _part(numbers: np.ndarray) -> np.ndarray:
    """0 train, 1 validation, 2 test: whole runs of 100, since the pictures of a writer
    follow one another.
    """
    block = numbers // 100 % 10
    return np.select([block == 4, block == 8], [1, 2], 0)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        # Here, for it takes a second.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "data.source='digits': scikit-learn, which holds the pictures, is not "
            f"installed ({error}); run pip install scikit-learn"
        ) from error
    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]
    images.setflags(write=False)
    return images, found.target


def version() -> str:
    """Identifies the content, which is the same on every machine."""
    return f"digits-{VERSION}"
