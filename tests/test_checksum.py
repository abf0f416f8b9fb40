"""Checksums: every bit and every position counts, the placement does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from triform.runtime.checksum import _checksum, _digits, _on_host, checksums


def sharded(devices: int, *spec) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "uint32", "float16"]
)
def test_every_single_bit_changes_the_checksum(dtype):
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 5)) * 50).astype(dtype)
    variants = {"original": x}
    for bit in range(8 * x.nbytes):
        flipped = bytearray(x.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        variants[str(bit)] = np.frombuffer(flipped, x.dtype).reshape(x.shape)
    # One stack, one program: the checksum of a row must not depend on its neighbours.
    sums = jax.jit(jax.vmap(_checksum))(jnp.asarray(np.stack(list(variants.values()))))
    for half in range(2):
        assert len(set(np.asarray(sums)[:, half].tolist())) >= len(variants) - 1
    assert (np.asarray(sums)[1:] != np.asarray(sums)[0]).all()


def test_checksum_sees_position_and_not_sharding():
    x = jnp.arange(64.0).reshape(8, 8)
    swapped = x.at[0, 0].set(1.0).at[0, 1].set(0.0)
    signs = x.at[2, 2].multiply(-1).at[3, 3].multiply(-1)
    trees = {"x": x, "swapped": swapped, "signs": signs, "turned": x.T, "bool": x > 3}
    sums = checksums(trees)
    assert len(set(sums.values())) == len(sums)
    for spec in ((), ("x",), (None, "x")):
        assert checksums({"x": jax.device_put(x, sharded(8, *spec))})["x"] == sums["x"]


@pytest.mark.parametrize(
    "dtype",
    [
        *("float32", "bfloat16", "float16", "float8_e4m3fn", "complex64"),
        *("int8", "int16", "int32", "uint8", "bool"),
    ],
)
def test_numpy_and_xla_give_the_same_digits(dtype):
    x = (np.random.default_rng(0).normal(size=(3, 4, 5)) * 50).astype(dtype)
    for case in (x, x.transpose(2, 0, 1), x[0, 0, 0]):
        assert _on_host(case) == _digits(np.asarray(_checksum(jnp.asarray(case))))
