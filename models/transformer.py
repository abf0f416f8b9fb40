"""FeedForward, Block and Stack: the trunk of every family."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from triform.models.algorithms import STATES
from triform.models.attention import Attention, kernel_init
from triform.models.cache import KVCache, RingCache
from triform.models.config import TransformerConfig
from triform.models.mask import Mask
from triform.models.matmul import dot_general
from triform.models.positions import Relative, RelativeBias, rotation

Array = jax.Array


def gelu(x: Array) -> Array:
    """Exact (Hendrycks & Gimpel 2016).

    In float32 by erf, for which XLA has one formula: nn.gelu takes erfc, of which it
    works out two and picks one. With fewer bits 1 + erf would be too coarse.
    """
    if x.dtype != jnp.float32:
        return nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


# name: (activation, gated). Gated units: Shazeer 2020, "GLU Variants".
FFNS = {
    "relu": (nn.relu, False),
    "silu": (nn.silu, False),
    "gelu": (gelu, False),
    "gelu_tanh": (functools.partial(nn.gelu, approximate=True), False),
    "geglu": (functools.partial(nn.gelu, approximate=True), True),
    "swiglu": (nn.silu, True),
}


@struct.dataclass
class Cache:
    """What decoding carries from token to token.

    Slots are filled left to right for all rows alike; a row's own positions say what is
    in them (negative: nothing), so rows may be padded on either side.
    """

    # Per block {"self": see models/cache.py, "cross": KVCache or None}; stacked if
    # scanned.
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
        """An empty cache of `length` slots, and room for a memory if there is one."""

        lead = (config.num_layers // cycle(config),) if config.scan_layers else ()
        rest = (config.kv_heads(), config.head_width())

        def block(window: int) -> dict[str, Any]:
            shape = (*lead, batch, length, *rest)
            if config.attention in STATES:
                kind = STATES[config.attention]
                own = kind.empty(shape, config.dtype, **config.options())
            # A bias is given for all slots: then a window's keys cannot move about.
            elif window and config.positions != "relative":
                slots = min(config.reach(window), length)
                own = RingCache.empty((*lead, batch, slots, *rest), config.dtype)
            else:
                own = KVCache.empty(shape, config.dtype)
            cross = None
            if memory_positions is not None:
                shape = (*lead, batch, memory_positions.shape[1], *rest)
                cross = KVCache.empty(shape, config.dtype)
            return {"self": own, "cross": cross}

        windows = config.windows or (0,)
        count = cycle(config) if config.scan_layers else config.num_layers
        return cls(
            blocks=[block(windows[i % len(windows)]) for i in range(count)],
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


def cycle(config: TransformerConfig) -> int:
    """How many consecutive blocks differ: what one step of a scanned trunk holds."""
    return max(1, len(config.windows))


def make_norm(config: TransformerConfig, name: str) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_eps, dtype=dtype, name=name)
    return nn.LayerNorm(
        epsilon=config.norm_eps, use_bias=config.bias == "all", dtype=dtype, name=name
    )


def dropout(module: nn.Module, x: Array) -> Array:
    """Dropout at the trunk's rate; on exactly when an rng named 'dropout' is given."""
    rate = module.config.dropout
    return nn.Dropout(rate, deterministic=not module.has_rng("dropout"))(x)


class FeedForward(nn.Module):
    """Position-wise feed-forward network, gated if the config's `ffn` is."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        cfg = self.config
        activation, gated = FFNS[cfg.ffn]

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(
                width,
                use_bias=cfg.bias == "all",
                dtype=jnp.dtype(cfg.dtype),
                kernel_init=kernel_init(cfg, name),
                dot_general=dot_general,
                name=name,
            )

        hidden = dense(cfg.d_ff, "up")(x)
        if gated:
            hidden = activation(dense(cfg.d_ff, "gate")(x)) * hidden
        else:
            hidden = activation(hidden)
        return dense(cfg.d_model, "down")(hidden)


class Block(nn.Module):
    """Self-attention, cross-attention if there is a memory, feed-forward.

    Post-norm is norm(x + f(x)) (Vaswani et al. 2017), pre-norm x + f(norm(x)).
    """

    config: TransformerConfig
    cross: bool = False
    window: int = 0

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Mask,
        memory: Array | None,
        memory_mask: Mask | None,
        relative: Relative,
        cache: dict[str, Any] | None,
        index: Array | None,
    ) -> tuple[Array, dict[str, Any] | None]:
        """x [B, L, D], memory [B, M, D] -> (x, cache)."""
        cfg = self.config
        cache = dict(cache) if cache is not None else None
        if self.window:
            mask = mask.replace(window=min(self.window, mask.window or self.window))

        def sublayer(name: str, x: Array, fn) -> Array:
            norm = make_norm(cfg, f"{name}_norm")
            if cfg.norm_position == "pre":
                return x + dropout(self, fn(norm(x)))
            return norm(x + dropout(self, fn(x)))

        def self_attention(y: Array) -> Array:
            attention = Attention(cfg, name="self_attention")
            if cache is None:
                return attention(y, y, mask, relative=relative)[0]
            y, cache["self"] = attention(
                y, y, mask, relative=relative, cache=cache["self"], index=index
            )
            return y

        def cross_attention(y: Array) -> Array:
            attention = Attention(cfg, name="cross_attention")
            if cache is None:
                return attention(y, memory, memory_mask)[0]
            # The memory's keys and values fill the cache once, then are only read.
            start = None if memory is None else jnp.zeros((), jnp.int32)
            y, cache["cross"] = attention(
                y, memory, memory_mask, cache=cache["cross"], index=start
            )
            return y

        x = sublayer("self_attention", x, self_attention)
        if self.cross:
            x = sublayer("cross_attention", x, cross_attention)
        x = sublayer("feed_forward", x, FeedForward(cfg, name="feed_forward"))
        return x, cache


class Cycle(nn.Module):
    """The consecutive blocks that differ, as one step of the scan over layers."""

    config: TransformerConfig
    cross: bool
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, caches, mask, memory, memory_mask, relative, index):
        """(x, caches of this cycle, ...) -> (x, caches)."""
        out = []
        for i in range(cycle(self.config)):
            window = self.config.windows[i] if self.config.windows else 0
            block = self.block(self.config, self.cross, window, name=f"layer_{i}")
            cache = None if caches is None else caches[i]
            x, cache = block(x, mask, memory, memory_mask, relative, cache, index)
            out.append(cache)
        return x, None if caches is None else out


class Stack(nn.Module):
    """num_layers blocks: the trunk. Same interface looped, scanned, remat, cached.

    Parameters: layer_0 .. layer_{N-1} looped; layers/layer_0 .. with a leading axis of
    N / cycle scanned; relative_bias (relative positions); norm (pre-norm only).
    """

    config: TransformerConfig
    cross: bool = False
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Mask,
        *,
        memory: Array | None = None,
        memory_mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        """x [B, L, D] -> ([B, L, D], cache).

        With a cache, x holds the next L tokens of each row and `mask` their positions;
        they see the cache's filled slots and themselves. `memory` is then needed at the
        first call only.
        """
        cfg = self.config
        index, caches = None, None
        if cache is not None:
            index, caches = cache.index, cache.blocks
            slots = jax.lax.dynamic_update_slice(
                cache.positions, mask.q_positions, (0, index)
            )
            mask = mask.replace(
                kv_positions=slots, q_segments=None, kv_segments=None, aligned=False
            )
        relative = self.relative(mask)
        x = dropout(self, x)
        block = self.block
        if cfg.remat:
            block = nn.remat(block, prevent_cse=not cfg.scan_layers)
        if cfg.scan_layers:
            scanned = nn.scan(
                Cycle,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, *(nn.broadcast,) * 5),
                length=cfg.num_layers // cycle(cfg),
            )
            layers = scanned(cfg, self.cross, block, name="layers")
            x, caches = layers(x, caches, mask, memory, memory_mask, relative, index)
        else:
            out = []
            for i in range(cfg.num_layers):
                window = cfg.windows[i % len(cfg.windows)] if cfg.windows else 0
                layer = block(cfg, self.cross, window, name=f"layer_{i}")
                layer_cache = None if caches is None else caches[i]
                x, layer_cache = layer(
                    x, mask, memory, memory_mask, relative, layer_cache, index
                )
                out.append(layer_cache)
            caches = out
        if cfg.norm_position == "pre":
            x = make_norm(cfg, "norm")(x)
        if cache is None:
            return x, None
        index = index + mask.q_positions.shape[1]
        return x, cache.replace(blocks=caches, positions=slots, index=index)

    @nn.nowrap
    def relative(self, mask: Mask) -> Relative:
        """What all blocks are told of positions, computed once."""
        cfg = self.config
        if cfg.positions == "rotary":
            return Relative(rotation=rotation(cfg, mask.q_positions))
        if cfg.positions == "relative":
            bias = RelativeBias(cfg, name="relative_bias")
            where = mask.q_positions, mask.kv_positions
            return Relative(bias=bias(*where, bidirectional=not mask.causal))
        return Relative()


def stacked_layers(params: Any, windows: int, xp: Any = jnp) -> Any:
    """A looped stack's parameters as a scanned one's, any tree that holds stacks.

    `windows` is the cycle; layer i becomes element i // cycle of layers/layer_(i mod
    cycle). `xp` is the module that stacks: numpy or jax.numpy.
    """
    if not isinstance(params, dict) or "layers" in params:
        return params
    layers = [k for k in params if k.startswith("layer_")]
    rest = {
        k: stacked_layers(v, windows, xp) for k, v in params.items() if k not in layers
    }
    if not layers:
        return rest
    ordered = [params[f"layer_{i}"] for i in range(len(layers))]
    groups = {
        f"layer_{i}": jax.tree.map(lambda *x: xp.stack(x), *ordered[i::windows])
        for i in range(windows)
    }
    return rest | {"layers": groups}


def looped_layers(params: Any) -> Any:
    """The inverse of `stacked_layers`."""
    if not isinstance(params, dict):
        return params
    if "layers" not in params:
        return {k: looped_layers(v) for k, v in params.items()}
    out = {k: looped_layers(v) for k, v in params.items() if k != "layers"}
    groups = params["layers"]
    repeats = len(jax.tree.leaves(groups)[0])
    for i in range(repeats * len(groups)):
        group = groups[f"layer_{i % len(groups)}"]
        out[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i // len(groups)], group)
    return out
