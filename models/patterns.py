"""Sparse patterns of attention: which distances and positions a layer sees."""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
# (positions of queries [..., L, 1], of keys [..., 1, S]) -> bool [..., L, S]
Pattern = Callable[[Array, Array], Array]


def strided(stride: int) -> Pattern:
    """The last `stride` positions, and every stride-th before them.

    Child et al. 2019, 4.2, both of its heads in one mask.
    """

    def sees(i: Array, j: Array) -> Array:
        distance = jnp.abs(i - j)
        return (distance < stride) | (distance % stride == 0)

    return sees


def fixed(stride: int) -> Pattern:
    """The own block of `stride` positions, and the last position of every block.

    Child et al. 2019, 4.3 with c = 1, both of its heads in one mask.
    """

    def sees(i: Array, j: Array) -> Array:
        return (i // stride == j // stride) | (j % stride == stride - 1)

    return sees


def row(text: int, side: int) -> Pattern:
    """The `side` positions before, in a grid of so many columns that follows `text`
    positions: back to the one above (Ramesh et al. 2021, figure 11a).

    The text is seen by all; so it is in the other patterns of grids.
    """

    def sees(i: Array, j: Array) -> Array:
        return (j < text) | (jnp.abs(i - j) <= side)

    return sees


def column(text: int, side: int) -> Pattern:
    """The positions of the same column (Ramesh et al. 2021, figure 11b)."""

    def sees(i: Array, j: Array) -> Array:
        return (j < text) | ((i - j) % side == 0)

    return sees


def conv(kernel: int, text: int, side: int) -> Pattern:
    """Those under a square of `kernel` positions around the own one, which runs on from
    the end of a row to the next (Ramesh et al. 2021, figure 11d).
    """
    reach = kernel // 2

    def sees(i: Array, j: Array) -> Array:
        distance = jnp.abs(i - j)
        rows = jnp.minimum((distance + reach) // side, reach)
        return (j < text) | (jnp.abs(distance - rows * side) <= reach)

    return sees


# name: fn(numbers) -> pattern; a trunk names "strided:8", or "none" for no pattern
PATTERNS = {
    "strided": strided,
    "fixed": fixed,
    "row": row,
    "column": column,
    "conv": conv,
}
# Patterns of a grid after a text. Models that have such name them without the last two
# numbers, "row" and "conv:5": how long the text is and how many columns there are.
GRIDS = ("row", "column", "conv")


def on_grid(pattern: str, text: int, side: int) -> str:
    """'row:16:4' of 'row', a pattern of a grid, if its last two numbers are missing."""
    name, *numbers = pattern.split(":")
    if name not in GRIDS or len(numbers) + 2 != _count(name):
        return pattern
    return f"{pattern}:{text}:{side}"


def _count(name: str) -> int:
    return len(inspect.signature(PATTERNS[name]).parameters)


def is_pattern(text: str) -> bool:
    """Whether `pattern_of` takes it."""
    name, *numbers = text.split(":")
    whole = all(x.isdecimal() and int(x) > 0 for x in numbers)
    known = name in PATTERNS and whole and len(numbers) == _count(name)
    return text == "none" or known


@functools.cache
def pattern_of(text: str) -> Pattern | None:
    """The pattern "name:numbers"; None for "none". The same text: the same object."""
    if text == "none":
        return None
    name, *numbers = text.split(":")
    return PATTERNS[name](*map(int, numbers))
