"""Sparse patterns of attention: which distances and positions a layer sees."""

import functools
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


# name: fn(number) -> pattern; a trunk names "strided:8", or "none" for no pattern
PATTERNS = {"strided": strided, "fixed": fixed}


def is_pattern(text: str) -> bool:
    """Whether `pattern_of` takes it."""
    name, _, number = text.partition(":")
    known = name in PATTERNS and number.isdecimal() and int(number) > 0
    return text == "none" or known


@functools.cache
def pattern_of(text: str) -> Pattern | None:
    """The pattern "name:number"; None for "none". The same text: the same object."""
    if text == "none":
        return None
    name, _, number = text.partition(":")
    return PATTERNS[name](int(number))
