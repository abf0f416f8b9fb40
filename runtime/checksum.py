"""Checksums of arrays, wherever and however they are placed."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Words = jax.Array | np.ndarray
BLOCK = 1 << 24  # bytes


def _mix(x: Words) -> Words:
    """A bijection of uint32 in which every input bit reaches every output bit.

    Constants: Wellons 2018, "Prospecting for hash functions", lowbias32.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, one or two words per element."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return x.astype(jnp.uint32)


def _checksum(x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Two sums over the elements of a hash of (value, position), modulo 2^32.

    `start` is the position of the first element. The first sum changes for certain with
    any one word, because `_mix` is a bijection; other changes pass with probability
    2^-64. Integer sums do not depend on order, hence not on the sharding.
    """
    words = _words(x)
    start = jnp.asarray(start, jnp.uint32) * jnp.uint32(words.size // x.size)
    position = jnp.full(words.shape, start)
    stride = 1
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    first = _mix(words ^ _mix(position))
    second = _mix(first + jnp.uint32(0x9E3779B9))
    return jnp.stack([first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)])


@functools.cache
def _checksum_on(sharding: NamedSharding | None) -> Any:
    return jax.jit(_checksum, out_shardings=sharding)


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """{path: 16 hex digits}, computed where the arrays are."""
    # One program per array, the next after the last has ended: equal shapes share a
    # compilation, and several programs with collectives in flight can deadlock where
    # a CPU has fewer cores than (simulated) devices.
    jax.block_until_ready(arrays)
    sums = {}
    for path, array in arrays.items():
        if _in_host_memory(array):
            large = array.nbytes > BLOCK
            sums[path] = _by_blocks(array) if large else _on_host(np.asarray(array))
            continue
        whole = None  # replicated, so that every process can read it
        if isinstance(array.sharding, NamedSharding):
            whole = NamedSharding(array.sharding.mesh, PartitionSpec())
        sums[path] = _digits(np.asarray(_checksum_on(whole)(array)))
    return sums


def _digits(pair: np.ndarray) -> str:
    return "{:08x}{:08x}".format(*pair.tolist())


def _in_host_memory(array: jax.Array) -> bool:
    one = len(array.sharding.device_set) == 1 and array.is_fully_addressable
    return one and next(iter(array.sharding.device_set)).platform == "cpu"


def _on_host(array: np.ndarray) -> str:
    """The same digits by NumPy: nothing is compiled for the shape."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.itemsize >= 4:
        words = flat.view(np.uint32)
    else:
        if jnp.issubdtype(flat.dtype, jnp.floating):
            flat = flat.view(f"uint{8 * flat.dtype.itemsize}")
        words = flat.astype(np.uint32)
    first = _mix(words ^ _mix(np.arange(words.size, dtype=np.uint32)))
    second = _mix(first + np.uint32(0x9E3779B9))
    return _digits(np.stack([x.sum(dtype=np.uint32) for x in (first, second)]))


def _by_blocks(array: jax.Array) -> str:
    """The same digits: sums of parts add up.

    XLA keeps the hash of every element until it is summed, as much memory as the array
    takes; of a block it is little.
    """
    flat = np.asarray(array).reshape(-1)  # a view
    step, total = BLOCK // flat.itemsize, np.zeros(2, np.uint32)
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        total += np.asarray(_checksum_on(None)(part, np.uint32(start % 2**32)))
    return _digits(total)
