"""Mask: who may see whom, described by positions and segments, not materialised."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from triform.runtime.errors import TriformError

Array = jax.Array


class Refused(TriformError, ValueError):
    """What an attention algorithm cannot do: the value, the rule and the fix."""


@struct.dataclass
class Mask:
    """Visibility of keys [B, S] to queries [B, L].

    A query sees a key when both lie in the same segment, the key's slot is filled
    (position >= 0), and the causal, window and pattern conditions hold on their
    *positions*. Array indices never matter, so packed rows, cached decoding and padding
    on either side need no special case.
    """

    q_positions: Array  # int32 [B, L]; negative: empty slot
    kv_positions: Array  # int32 [B, S]; negative: empty slot
    q_segments: Array | None = None  # int32 [B, L]; 0: padding. None: one segment
    kv_segments: Array | None = (
        None  # int32 [B, S]; given with q_segments or not at all
    )
    q_global: Array | None = None  # bool [B, L]: sees past window and pattern
    kv_global: Array | None = None  # bool [B, S]: is seen past window and pattern
    causal: bool = struct.field(pytree_node=False, default=False)
    # Keys with |i - j| < window are in reach; 0: no limit. Dilated: of these steps each
    # is `dilation` positions long.
    window: int = struct.field(pytree_node=False, default=0)
    dilation: int = struct.field(pytree_node=False, default=1)
    # pattern(i [B, l, 1], j [B, 1, s]) -> bool [B, l, s], on positions.
    pattern: Callable[[Array, Array], Array] | None = struct.field(
        pytree_node=False, default=None
    )
    # What the maker of the mask knows and fused kernels ask for: the positions of both
    # sides are the array indices.
    aligned: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def self_attention(
        cls, positions: Array, segments: Array | None = None, **options
    ) -> "Mask":
        """A sequence that looks at itself: positions and segments [B, L]."""
        return cls(positions, positions, segments, segments, **options)

    def allowed(
        self, q_slice: slice = slice(None), kv_slice: slice = slice(None)
    ) -> Array:
        """bool [B, l, s]: may query l see key s. The one meaning of every field."""
        i = self.q_positions[:, q_slice, None]
        j = self.kv_positions[:, None, kv_slice]
        near = jnp.ones((), bool)
        if self.window:
            near = jnp.abs(i - j) < self.window * self.dilation
            if self.dilation > 1:
                near &= (i - j) % self.dilation == 0
        if self.pattern is not None:
            near &= self.pattern(i, j)
        if self.q_global is not None:
            near |= self.q_global[:, q_slice, None]
        if self.kv_global is not None:
            near |= self.kv_global[:, None, kv_slice]
        seen = near & (j >= 0) & (i >= 0)
        if self.q_segments is not None:
            q = self.q_segments[:, q_slice, None]
            kv = self.kv_segments[:, None, kv_slice]
            seen &= (q == kv) & (kv > 0)
        if self.causal:
            seen &= j <= i
        return seen
