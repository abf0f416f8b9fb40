"""Exact attention without an [L, S] array: the fastest way that the case allows."""

import contextvars
import functools
import sys

import jax
import jax.numpy as jnp

from triform.models.algorithms.blockwise import BLOCK, blockwise
from triform.models.algorithms.dot import dot
from triform.models.mask import Mask, Refused

Array = jax.Array

PATHS = ("auto", "cudnn", "pallas", "xla")
# With so few queries (decoding) an [L, S] array is small.
FEW = 16
# Entries of the largest mask that cuDNN gets as an array, for one row.
MASK_ENTRIES = 4096**2


def flash(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    bias: Array | None = None,
    rng: Array | None = None,
    dropout: float = 0.0,
    path: str = "auto",
    block: int = BLOCK,
) -> Array:
    """What `dot` computes, for every mask and bias; see there for the shapes.

    On GPUs cuDNN, on TPUs the Pallas kernel that comes with JAX, where they take the
    case; else, and on CPUs, block by block in XLA (blockwise.py, with blocks of
    `block`). What runs is decided by shapes and the mask's static parts, while tracing,
    and written once to standard error. `path` fixes one; an error if it refuses.

    Told to be deterministic, as entry points tell XLA, cuDNN's backward pass allocates
    2 bytes for every head, query and key (see benchmarks/RESULTS.md).
    """
    if path not in PATHS:
        raise Refused(
            f"model.trunk.attention_options: path={path!r}: expected one of "
            f"{', '.join(PATHS)}"
        )
    if q.shape[1] <= FEW:
        return dot(q, k, v, mask, scale=scale, bias=bias, rng=rng, dropout=dropout)
    dropped = dropout if rng is not None else 0.0
    path, reason = choose(path, jax.default_backend(), q, k, mask, bias, dropped)
    _say(f"attention: flash runs through {path}{reason and f' ({reason})'}")
    if path == "cudnn":
        return _cudnn(q, k, v, mask, scale, bias)
    if path == "pallas":
        return _pallas(q, k, v, mask, scale, bias)
    return blockwise(
        q, k, v, mask, scale=scale, bias=bias, rng=rng, dropout=dropout, block=block
    )


# Is what runs said? Not of a program that is only looked at, for other devices perhaps.
told: contextvars.ContextVar[bool] = contextvars.ContextVar("told", default=True)


def _say(text: str) -> None:
    if told.get():
        _say_once(text)


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def choose(
    path: str,
    backend: str,
    q: Array,
    k: Array,
    mask: Mask,
    bias: Array | None,
    dropout: float,
) -> tuple[str, str]:
    """(path, why it is not the accelerator's own); the latter is '' where it is.

    Raises Refused if `path` names one that refuses.
    """
    kernel = {"gpu": "cudnn", "tpu": "pallas"}.get(backend)
    if path == "xla":
        return "xla", "as attention_options say"
    if path == "auto" and kernel is None:
        return "xla", f"no kernel for {backend}"
    wanted = kernel if path == "auto" else path
    if wanted != kernel:
        refusal = f"it does not run on {backend}"
    else:
        refuse = _cudnn_refusal if wanted == "cudnn" else _pallas_refusal
        refusal = refuse(q, k, mask, bias, dropout)
    if not refusal:
        return wanted, ""
    if path != "auto":
        raise Refused(
            f"model.trunk.attention_options: path={path!r}: {refusal}; leave it 'auto'"
        )
    return "xla", f"{wanted} refuses: {refusal}"


def _cudnn_refusal(q, k, mask: Mask, bias, dropout: float) -> str:
    """Why cuDNN does not take the case; '' if it does."""
    width = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype}, not bfloat16"
    if width % 8 or width > 128:
        return f"heads of {width}, not a multiple of 8 up to 128"
    if q.shape[1] % 2 or k.shape[1] % 2:
        return "an odd number of queries or keys"
    if dropout:
        return "dropout of weights"
    if _as_array(mask) and q.shape[1] * k.shape[1] > MASK_ENTRIES:
        return f"its mask would be an array of more than {MASK_ENTRIES:,} entries a row"
    return ""


def _as_array(mask: Mask) -> bool:
    """Whether cuDNN needs the mask as an array."""
    plain = mask.aligned and mask.q_segments is None and mask.q_global is None
    plain &= mask.kv_global is None and mask.pattern is None and mask.dilation == 1
    return not plain or bool(mask.window and not mask.causal)


def _cudnn(q, k, v, mask: Mask, scale: float, bias) -> Array:
    attend = functools.partial(
        jax.nn.dot_product_attention, scale=scale, implementation="cudnn"
    )
    if bias is not None:
        bias = bias.astype(q.dtype)
    if not _as_array(mask):
        window = (mask.window - 1, 0) if mask.window else None
        return attend(q, k, v, bias, is_causal=mask.causal, local_window_size=window)
    seen = mask.allowed()
    out = attend(
        q, k, v, bias, jnp.broadcast_to(seen[:, None], (len(q), 1, *seen.shape[1:]))
    )
    # cuDNN gives a query that sees nothing the mean of all values.
    return jnp.where(seen.any(-1)[..., None, None], out, 0)


def _pallas_refusal(q, k, mask: Mask, bias, dropout: float) -> str:
    """Why the TPU's kernel does not take the case; '' if it does."""
    if not mask.aligned:
        return "positions are not the array indices"
    if mask.window or mask.pattern is not None or mask.q_global is not None:
        return "windows, patterns or global tokens"
    if q.shape[1] != k.shape[1] or q.shape[1] % 128:
        return f"{q.shape[1]} queries and {k.shape[1]} keys, not equal multiples of 128"
    if dropout:
        return "dropout of weights"
    return ""


def _pallas(q, k, v, mask: Mask, scale: float, bias) -> Array:
    # Imported here: it pulls in the TPU's compiler.
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    shape, repeats = q.shape[:2], q.shape[2] // k.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    k, v = (jnp.repeat(x, repeats, 1) for x in (k, v))
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*q.shape[:3], k.shape[2])).astype(q.dtype)
    segments = None
    if mask.q_segments is not None:
        sides = mask.q_segments, mask.kv_segments
        sides = (jnp.broadcast_to(x, shape).astype(jnp.int32) for x in sides)
        segments = kernel.SegmentIds(*sides)
    out = kernel.flash_attention(
        q, k, v, bias, segments, causal=mask.causal, sm_scale=scale
    ).swapaxes(1, 2)
    if mask.q_segments is None:
        return out
    # To the kernel padding is a segment like any other.
    return jnp.where((mask.q_segments > 0)[..., None, None], out, 0)
