"""Scores of a vocabulary: what every family with tokens ends with."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import TransformerConfig
from triform.models.matmul import add_bias, dot_general

Array = jax.Array


@jax.tree_util.register_pytree_node_class
class Logits:
    """Logits float32 [B, L, V] that are never there all at once.

    `map` computes those of some positions after another, in the backward pass once
    more: of [B, L, V] numbers, often the largest array of a step, [B, L / chunks, V]
    are held.
    """

    def __init__(self, x: Array, kernel: Array, bias: Array | None, chunks: int):
        """Of x [B, L, D] times kernel [D, V] plus bias [V]."""
        self._x, self._kernel, self._bias, self._chunks = x, kernel, bias, chunks
        self._known: list[tuple[Any, tuple[Array, ...], Any]] = []  # see `map`

    def tree_flatten(self) -> tuple[tuple, int]:
        """For JAX: the arrays, and the number of parts."""
        return (self._x, self._kernel, self._bias), self._chunks

    @classmethod
    def tree_unflatten(cls, chunks: int, arrays: tuple) -> "Logits":
        """The inverse."""
        return cls(*arrays, chunks)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, V)."""
        return (*self._x.shape[:-1], self._kernel.shape[-1])

    def plus(self, x: Array, kernel: Array) -> "Logits":
        """These plus x [B, L, r] times kernel [r, V]."""
        x = jnp.concatenate([self._x, x.astype(self._x.dtype)], -1)
        kernel = jnp.concatenate([self._kernel, kernel.astype(self._kernel.dtype)])
        return Logits(x, kernel, self._bias, self._chunks)

    def map(self, function: Callable[..., Any], *others: Array, key: Any = None) -> Any:
        """function(logits [B, n, V], *others [B, n, ...]) of all positions.

        A tree of arrays [B, L, ...]. `function` must treat positions alike. What was
        asked for under a key is remembered with the very same others: a loss and its
        metrics need one pass.
        """
        for known, arrays, result in self._known:
            if known == key and list(map(id, arrays)) == list(map(id, others)):
                return result
        length = self._x.shape[1]
        size = -(-length // self._chunks)

        def parts(x: Array) -> Array:
            """[B, L, ...] -> [chunks, B, n, ...], the last one padded."""
            room = -(-length // size) * size - length
            x = jnp.pad(x, [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)])
            return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)

        # In a loop nothing is merged with the forward pass: no barriers are needed.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_part(part: tuple[Array, ...]) -> Any:
            x, *rest = part
            return function(_product(x, self._kernel, self._bias), *rest)

        def joined(x: Array) -> Array:
            x = jnp.moveaxis(x, 0, 1)
            return x.reshape(len(x), -1, *x.shape[3:])[:, :length]

        made = jax.lax.map(of_part, tuple(map(parts, (self._x, *others))))
        result = jax.tree.map(joined, made)
        if key is not None:
            self._known.append((key, others, result))
        return result

    def array(self) -> Array:
        """float32 [B, L, V]."""
        return _product(self._x, self._kernel, self._bias)


def whole(logits: Array | Logits) -> Array:
    """float32 [..., V]: all at once."""
    return logits.array() if isinstance(logits, Logits) else logits


def _product(x: Array, kernel: Array, bias: Array | None) -> Array:
    # The cast is here so that gradients of parts add up in the parameter's precision.
    kernel, axes = kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ()))
    out = dot_general(x, kernel, axes, preferred_element_type=jnp.float32)
    return out if bias is None else add_bias(out, bias)


def logits(
    x: Array, kernel: Array, bias: Array | None = None, chunks: int = 1
) -> Array | Logits:
    """float32 [..., V] of x [..., D], kernel [D, V] and bias [V]; in parts if
    chunks > 1.

    They are accumulated in float32: in bfloat16 the best ones would tie.
    """
    if chunks > 1:
        return Logits(x, kernel, bias, min(chunks, x.shape[1]))
    return _product(x, kernel, bias)


def tied_logits(
    x: Array, table: nn.Embed, bias: Array | None = None, chunks: int = 1
) -> Array | Logits:
    """Logits of x [..., D] over the rows of a table: its transpose is the kernel."""
    return logits(x, table.embedding.T, bias, chunks)


class Head(nn.Dense):
    """[..., D] -> logits [..., features]; see `logits`. Parameters: kernel, bias."""

    chunks: int = 1

    @nn.compact
    def __call__(self, x: Array, bias: Array | None = None) -> Array | Logits:
        """A bias that is not its own may be given."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        zeros = nn.initializers.zeros
        if self.use_bias:
            bias = self.param("bias", zeros, (self.features,))
        return logits(x.astype(self.dtype), kernel, bias, self.chunks)


def head(
    trunk: TransformerConfig,
    size: int,
    bias: bool = False,
    name: str | None = None,
    chunks: int = 1,
) -> Head:
    """[..., D] -> logits [..., size] of a kernel of its own."""
    return Head(
        size,
        use_bias=bias,
        dtype=jnp.dtype(trunk.dtype),
        kernel_init=nn.initializers.normal(0.02),
        chunks=chunks,
        name=name,
    )
