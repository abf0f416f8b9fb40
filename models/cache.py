"""What decoding carries for one attention layer from token to token.

All have two methods: `empty` makes one, and `attend` takes the next tokens' queries,
keys and values, and returns what the algorithm makes of them and of all before, and the
cache with them in it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from triform.models.mask import Mask

Array = jax.Array


@struct.dataclass
class KVCache:
    """Keys and values [B, S, K, E] of one attention layer; [N, B, S, K, E] scanned."""

    key: Array
    value: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> "KVCache":
        """Of keys' shape [B, S, K, E]."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, key: Array, value: Array, index: Array) -> "KVCache":
        """Puts key and value [B, l, K, E] into the slots index .. index + l - 1."""
        start = (0, index, 0, 0)
        return KVCache(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(
                self.value, value.astype(self.value.dtype), start
            ),
        )

    def attend(
        self,
        algorithm: Callable,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask,
        index: Array,
        **options,
    ) -> tuple[Array, "KVCache"]:
        """The new tokens in the slots from `index` on; `mask` is of all slots."""
        cache = self.write(key, value, index)
        seen = cache.key.astype(key.dtype), cache.value.astype(value.dtype)
        return algorithm(query, *seen, mask, **options), cache


@struct.dataclass
class RingCache:
    """The last keys and values of each row: all that a window of so many reaches.

    A token of position p lies in slot p mod R, so that its memory does not grow.
    """

    key: Array  # [B, R, K, E]; [N, B, R, K, E] scanned, the others likewise
    value: Array
    positions: Array  # int32 [B, R]; negative: nothing

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> "RingCache":
        """Of keys' shape [B, R, K, E]."""
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, jnp.full(shape[:-2], -1, jnp.int32))

    def attend(
        self,
        algorithm: Callable,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask,
        index: Array,
        **options,
    ) -> tuple[Array, "RingCache"]:
        """The new tokens see the ring and themselves, and then go into it."""
        where = jnp.broadcast_to(mask.q_positions, key.shape[:2])
        mask = mask.replace(kv_positions=jnp.concatenate([self.positions, where], 1))
        seen = (
            jnp.concatenate([old.astype(new.dtype), new], 1)
            for old, new in ((self.key, key), (self.value, value))
        )
        out = algorithm(query, *seen, mask, **options)
        size = self.positions.shape[1]
        # Of more tokens than slots the last stay. Slot `size` is none: dropped.
        stays = (where >= 0) & (where > where.max(1, keepdims=True) - size)
        slots = jnp.where(stays, where % size, size)
        rows = jnp.arange(len(slots))[:, None]

        def put(old: Array, new: Array) -> Array:
            return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")

        return out, RingCache(
            put(self.key, key), put(self.value, value), put(self.positions, where)
        )
