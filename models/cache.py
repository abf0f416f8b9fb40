"""What decoding carries from token to token: `Cache`, one of these a layer.

Those of a layer have two methods: `empty` makes one, and `attend` takes queries, keys
and values of the next tokens and returns the algorithm's output over these and all
earlier ones, and the cache that holds them too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from triform.models.algorithms import STATES
from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.positions import POSITIONS

Array = jax.Array


@struct.dataclass
class KVCache:
    """Keys and values of one attention layer, with a leading axis if scanned.

    Stored as the products of one query take them: a token that is written transposes
    none of those before it.
    """

    keys: Array  # [B, K, E, S]
    values: Array  # [B, K, S, E]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> "KVCache":
        """For keys and values [B, S, K, E]."""
        *lead, slots, heads, width = shape
        return cls(
            jnp.zeros((*lead, heads, width, slots), dtype),
            jnp.zeros((*lead, heads, slots, width), dtype),
        )

    def write(self, key: Array, value: Array, index: Array) -> "KVCache":
        """Puts key and value [B, l, K, E] into the slots index .. index + l - 1."""
        put = jax.lax.dynamic_update_slice
        key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
        return KVCache(
            put(self.keys, key.astype(self.keys.dtype), (0, 0, 0, index)),
            put(self.values, value.astype(self.values.dtype), (0, 0, index, 0)),
        )

    def read(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        """All keys and values, [B, S, K, E]."""
        key, value = self.keys.astype(dtype), self.values.astype(dtype)
        return key.transpose(0, 3, 1, 2), value.transpose(0, 2, 1, 3)

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
        return algorithm(query, *cache.read(key.dtype), mask, **options), cache


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


@struct.dataclass
class Cache:
    """What decoding carries from token to token.

    Slots are filled left to right for all rows alike; a row's own positions say what is
    in them (negative: nothing), so rows may be padded on either side.
    """

    # Per block {"self": one of the above or of STATES, "cross": KVCache or None};
    # stacked if scanned.
    blocks: Any
    positions: Array  # int32 [B, S]
    index: Array  # int32 []: the next free slot
    memory_positions: Array | None = None  # int32 [B, M]; negative: padding
    scanned: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        batch: int,
        length: int,
        memory_positions: Array | None = None,
    ) -> "Cache":
        """An empty cache of `length` slots, and one for the memory if there is one."""
        steps = config.num_layers // config.cycle()
        lead = (steps,) if config.scan_layers else ()
        rest = (config.kv_heads(), config.head_width())

        def block(window: int) -> dict[str, Any]:
            shape = (*lead, batch, length, *rest)
            if config.attention in STATES:
                kind = STATES[config.attention]
                own = kind.empty(shape, config.dtype, **config.options())
            # A relative bias has one column for each slot: keys must stay in them.
            elif window and not POSITIONS[config.positions].biased:
                slots = min(config.reach(window), length)
                own = RingCache.empty((*lead, batch, slots, *rest), config.dtype)
            else:
                own = KVCache.empty(shape, config.dtype)
            cross = None
            if memory_positions is not None:
                shape = (*lead, batch, memory_positions.shape[1], *rest)
                cross = KVCache.empty(shape, config.dtype)
            return {"self": own, "cross": cross}

        count = config.cycle() if config.scan_layers else config.num_layers
        return cls(
            blocks=[block(config.limits_of(i)[0]) for i in range(count)],
            positions=jnp.full((batch, length), -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
            memory_positions=memory_positions,
            scanned=config.scan_layers,
        )

    def map_rows(self, fn, *, memory: bool = True) -> "Cache":
        """Applies fn(array [B, ...]) to every per-row array.

        memory=False leaves what belongs to the memory alone: beams of one source share
        it, so that reordering beams need not copy it.
        """
        axis = 1 if self.scanned else 0

        def kv(x: Array) -> Array:
            return jax.vmap(fn)(x) if axis else fn(x)

        blocks = [
            {
                "self": jax.tree.map(kv, b["self"]),
                "cross": jax.tree.map(kv, b["cross"]) if memory else b["cross"],
            }
            for b in self.blocks
        ]
        where = self.memory_positions
        return self.replace(
            blocks=blocks,
            positions=fn(self.positions),
            memory_positions=fn(where) if memory and where is not None else where,
        )
