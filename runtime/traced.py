"""Numbers of a config whose value a program gets as an input, not as a constant."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def _arithmetic(f: Callable, swapped: bool = False) -> Callable:
    """The operator on the array, which is what it gives."""

    def apply(self: "Traced", other: Any) -> Array:
        other = other.array if isinstance(other, Traced) else other
        return f(other, self.array) if swapped else f(self.array, other)

    return apply


def _order(f: Callable) -> Callable:
    """Compared with 0: as a positive number is; with arrays: an array."""

    def compare(self: "Traced", other: Any) -> Any:
        if isinstance(other, int | float):
            if other != 0:
                raise TypeError(
                    f"a traced number cannot be compared with {other}: its value is "
                    "not known yet; use jnp.where, jnp.minimum or jnp.maximum"
                )
            return f(1, 0)
        other = other.array if isinstance(other, Traced) else other
        return f(self.array, other)

    return compare


class Traced:
    """A number that stands where a config has a Python number, and is an array [].

    Code that asks about it in Python, to leave out what a rate of 0 does not need, is
    answered as of a positive number that equals no other: `if rate`, `rate > 0` and
    `rate != 1` hold. What it computes must then be right for every value that occurs.
    Promotes types as a Python number does.
    """

    def __init__(self, array: Array):
        self.array = array

    def __jax_array__(self) -> Array:
        return self.array

    def __bool__(self) -> bool:
        return True

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __deepcopy__(self, memo: dict) -> "Traced":
        return self

    def __neg__(self) -> Array:
        return -self.array

    __add__ = _arithmetic(operator.add)
    __radd__ = _arithmetic(operator.add, swapped=True)
    __sub__ = _arithmetic(operator.sub)
    __rsub__ = _arithmetic(operator.sub, swapped=True)
    __mul__ = _arithmetic(operator.mul)
    __rmul__ = _arithmetic(operator.mul, swapped=True)
    __truediv__ = _arithmetic(operator.truediv)
    __rtruediv__ = _arithmetic(operator.truediv, swapped=True)
    __pow__ = _arithmetic(operator.pow)
    __rpow__ = _arithmetic(operator.pow, swapped=True)
    __lt__ = _order(operator.lt)
    __le__ = _order(operator.le)
    __gt__ = _order(operator.gt)
    __ge__ = _order(operator.ge)


def stacked(numbers: Sequence[int | float]) -> Array:
    """[K], weakly typed: in a bfloat16 model the numbers are bfloat16, as constants."""
    return jnp.stack([jnp.asarray(number) for number in numbers])
