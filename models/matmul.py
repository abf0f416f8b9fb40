"""The matrix product of the trunk's dense layers and of its heads, and their bias."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, **options) -> Array:
    """lax.dot_general of the last axes of `lhs` with the first ones of `rhs`.

    On CPUs as a product of two matrices: of a batch of sequences, [B, L, D], XLA would
    first transpose both operands of the kernel's gradient, which sums over two axes
    (see benchmarks/RESULTS.md). Elsewhere rows and positions remain two axes: they may
    be split over different axes of a mesh.
    """
    if jax.default_backend() != "cpu":
        return lax.dot_general(lhs, rhs, dimension_numbers, **options)
    count = len(dimension_numbers[0][0])
    size = math.prod(rhs.shape[:count])
    a, b = lhs.reshape(-1, size), rhs.reshape(size, -1)
    out = lax.dot_general(a, b, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*lhs.shape[:-count], *rhs.shape[count:])


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [..., *features] + bias [*features].

    On CPUs the gradient of the bias is a product with a row of ones. XLA would fuse the
    sum over positions with what made its operand, such as the derivative of gelu, and
    compute that column by column (see benchmarks/RESULTS.md).
    """
    return x + bias


def _add_bias(x: Array, bias: Array) -> tuple[Array, tuple[int, ...]]:
    return x + bias, bias.shape


def _add_bias_back(shape: tuple[int, ...], g: Array) -> tuple[Array, Array]:
    if jax.default_backend() != "cpu":
        return g, g.sum(range(g.ndim - len(shape)))
    rows = g.reshape(-1, math.prod(shape))
    total = jnp.ones((1, len(rows)), g.dtype) @ rows
    return g, total.reshape(shape)


add_bias.defvjp(_add_bias, _add_bias_back)
