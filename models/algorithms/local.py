"""Sliding-window attention with global tokens (Longformer, Beltagy et al. 2020)."""

import jax
import jax.numpy as jnp

from triform.models.algorithms.flash import flash
from triform.models.mask import Mask, Refused

Array = jax.Array


def local(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    bias: Array | None = None,
    rng: Array | None = None,
    dropout: float = 0.0,
    of_globals: tuple[Array, Array, Array] | None = None,
    dilation: int = 1,
    dilated_heads: int = 0,
) -> Array:
    """What the mask's window reaches, and global tokens both ways; see `dot`.

    Time and memory grow with L; without a window (cross-attention, and layers that
    `windows` leaves unlimited) it is `flash`. `of_globals` are q, k, v of projections
    of their own, by which global queries look at all keys; without it they use the
    others. The first `dilated_heads` heads, all if it is 0, take steps of `dilation`
    positions in the window (3.1). Decoding keeps a ring of the window's keys
    (models/cache.py).
    """
    heads = q.shape[2]
    if not 0 <= dilated_heads <= heads or (dilated_heads and k.shape[2] != heads):
        raise Refused(
            f"model.trunk.attention_options: dilated_heads={dilated_heads}: must be at "
            f"most {heads}, and 0 (all) where keys are shared by heads"
        )
    rest = {"scale": scale, "rng": rng, "dropout": dropout}
    near = mask if of_globals is None else mask.replace(q_global=None)
    far = near.replace(dilation=dilation)
    if dilated_heads in (0, heads) or dilation == 1:
        out = flash(q, k, v, far, bias=bias, **rest)
    else:
        groups = slice(dilated_heads), slice(dilated_heads, None)
        parts = [
            flash(
                *(x[:, :, group] for x in (q, k, v)),
                by,
                bias=None if bias is None else bias[:, group],
                **rest,
            )
            for group, by in zip(groups, (far, near), strict=True)
        ]
        out = jnp.concatenate(parts, 2)
    if of_globals is None:
        return out
    # Blocks without a global query are not visited.
    chosen = jnp.where(mask.q_global, mask.q_positions, -1)
    everything = mask.replace(
        q_positions=chosen, window=0, q_global=None, kv_global=None, aligned=False
    )
    everywhere = flash(*of_globals, everything, bias=bias, **rest)
    return jnp.where(mask.q_global[..., None, None], everywhere, out)
