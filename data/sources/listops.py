"""ListOps of the Long Range Arena: nested lists of digits; nothing to download.

Nangia & Bowman 2018, "ListOps"; Tay et al. 2021, "Long Range Arena", whose generator
gives the sizes and the odds. An expression is an operator and 2 to 10 arguments, each a
digit or another expression, at most 10 levels in all; its value is a digit. Texts have
501 to 1,999 tokens.

A text has one character for each of the 15 tokens, so that a tokenizer of characters
makes one id of each: '_' for [MIN, '^' for [MAX, '-' for [MED, '+' for [SM (the sum
modulo 10), ']' and the digits. The published '[MIN 2 [SM 7 5 ] 9 ]' is '_2+75]9]' here.
The parentheses of the published files are left out, as there before they are read.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

VERSION = 1
SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}
SPLITS = tuple(SIZES)
OPERATORS = ("_", "^", "-", "+")  # minimum, maximum, median, sum modulo 10
END = "]"
MAX_DEPTH, MAX_ARGUMENTS = 10, 10
SHORTER, LONGER = 500, 2000  # neither is a length: the published bounds are strict
BLOCK = 1000  # examples generated at once
CANDIDATES = 3500  # trees grown at once, a third of which are neither short nor long


class Expressions(Sequence):
    """Example dicts {'text', 'label'} of a split, generated block by block."""

    def __init__(self, split: str) -> None:
        self._split = split

    def __len__(self) -> int:
        return SIZES[self._split]

    def __getitem__(self, index: int) -> dict[str, str | int]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index}: the split has {size} examples")
        block, number = divmod(index % size, BLOCK)
        text, label = _block(self._split, block)[number]
        return {"text": text, "label": label}


def examples(split: str) -> Expressions:
    """The expressions of 'train', 'validation' or 'test', and their values, 0 to 9.

    They are generated block by block.
    """
    return Expressions(split)


def version() -> str:
    """Identifies the content, which is the same on every machine."""
    return f"listops-{VERSION}"


@dataclasses.dataclass
class Level:
    """The nodes of one depth of many trees, from left to right.

    `arguments` and `operator` are of the inner nodes alone, whose arguments are, in
    this order, the nodes of the next level.
    """

    tree: np.ndarray  # which tree a node is of
    inner: np.ndarray  # bool
    digit: np.ndarray  # its value, if it is a leaf
    operator: np.ndarray
    arguments: np.ndarray

    def of(self, trees: np.ndarray) -> "Level":
        """The nodes of some of the trees: a bool for each."""
        kept = trees[self.tree]
        among = kept[self.inner]
        return Level(
            (np.cumsum(trees) - 1)[self.tree[kept]],
            self.inner[kept],
            self.digit[kept],
            self.operator[among],
            self.arguments[among],
        )

    def first(self) -> np.ndarray:
        """The index in the next level of the first argument of every inner node."""
        return np.cumsum(self.arguments) - self.arguments


@functools.lru_cache(maxsize=2)
def _block(split: str, number: int) -> list[tuple[str, int]]:
    # NumPy keeps the bits of a bit generator for ever, but not what the methods of
    # Generator make of them.
    bits = np.random.PCG64([VERSION, SPLITS.index(split), number])
    found: list[tuple[str, int]] = []
    while len(found) < BLOCK:
        levels = _grow(bits, CANDIDATES)
        found += zip(_texts(levels), _values(levels).tolist(), strict=True)
    return found[:BLOCK]


def _grow(bits: np.random.PCG64, count: int) -> list[Level]:
    """The levels of those of `count` trees that are neither too short nor too long.

    Two of so many tokens are never equal: the odds are below 10**-200.
    """
    levels: list[Level] = []
    tree = np.arange(count)
    sizes = np.zeros(count, np.int64)  # tokens, of the levels so far
    for depth in range(1, MAX_DEPTH + 1):
        draw = bits.random_raw(len(tree))
        # A quarter are operators. Of the roots, all: a digit alone is too short.
        inner = draw % 4 == 0 if depth > 1 else np.ones(count, bool)
        inner &= depth < MAX_DEPTH
        rest = draw[inner] >> 2
        arguments = (2 + (rest >> 2) % (MAX_ARGUMENTS - 1)).astype(np.int64)
        digit = ((draw >> 2) % 10).astype(np.int64)
        levels.append(Level(tree, inner, digit, (rest % 4).astype(np.int64), arguments))
        sizes += np.bincount(tree, 1 + inner, count).astype(np.int64)
        tree = np.repeat(tree[inner], arguments)
        tree = tree[(sizes < LONGER)[tree]]  # what is too long need not grow on
    kept = (sizes > SHORTER) & (sizes < LONGER)
    return [level.of(kept) for level in levels]


def _values(levels: list[Level]) -> np.ndarray:
    """The value of every tree, computed from the leaves up."""
    values = levels[-1].digit
    for level in levels[-2::-1]:
        first, count = level.first(), level.arguments
        parent = np.repeat(np.arange(len(first)), count)
        ordered = values[np.lexsort((values, parent))]
        middle = ordered[first + (count - 1) // 2] + ordered[first + count // 2]
        results = (
            ordered[first],
            ordered[first + count - 1],
            middle // 2,  # of an even number of arguments, rounded down as published
            _sums(values, level) % 10,
        )
        values = level.digit.copy()
        values[level.inner] = np.choose(level.operator, results)
    return values


def _texts(levels: list[Level]) -> list[str]:
    """The text of every tree: sizes from leaves to root, then positions from root."""
    sizes = [np.ones(len(levels[-1].tree), np.int64)]
    for level in levels[-2::-1]:
        size = np.ones(len(level.tree), np.int64)
        size[level.inner] = 2 + _sums(sizes[0], level)  # the operator and the end
        sizes.insert(0, size)
    ends = np.cumsum(sizes[0])
    positions = ends - sizes[0]
    symbols = np.frombuffer("".join(OPERATORS).encode(), np.uint8)
    text = np.zeros(ends[-1], np.uint8)
    for level, size, below in zip(levels, sizes, [*sizes[1:], None], strict=True):
        text[positions] = level.digit + ord("0")
        heads = positions[level.inner]
        text[heads] = symbols[level.operator]
        text[heads + size[level.inner] - 1] = ord(END)
        if below is not None:
            before = np.cumsum(below) - below
            # From the operator: one for itself, and the arguments further left.
            base = heads + 1 - before[level.first()]
            positions = np.repeat(base, level.arguments) + before
    joined, starts = text.tobytes().decode(), [0, *ends.tolist()]
    return [joined[a:b] for a, b in itertools.pairwise(starts)]


def _sums(numbers: np.ndarray, level: Level) -> np.ndarray:
    """For every inner node of a level, the sum over its arguments."""
    return np.add.reduceat(numbers, level.first())
