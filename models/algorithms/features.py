"""Positive random features of kernels (Choromanski et al. 2021, 2.2 to 2.4).

exp(q k) is the expectation of phi(q) phi(k) over standard normal rows w, of which
phi(x) are functions of w x. Features are given by their logarithms, so that whoever
sums them may choose what to divide them by before they become numbers.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

# Added to the ReLU's features, which might all be zero (as in the authors' code).
EPSILON = 1e-3


def _softmax(along: Array, x: Array) -> Array:
    return along - jnp.square(x).sum(-1, keepdims=True) / 2


def _relu(along: Array, x: Array) -> Array:
    return jnp.log(jax.nn.relu(along) + EPSILON)


# name: fn(w x [..., M], x [..., E]) -> logarithms of sqrt(M) phi(x) [..., M]
KERNELS = {"softmax": _softmax, "relu": _relu}


def log_features(x: Array, projection: Array, kernel: str = "softmax") -> Array:
    """log phi(x), float32 [..., M], of x [..., E] and rows w [M, E].

    softmax: phi(x) = exp(w x - |x|^2 / 2) / sqrt(M) (Lemma 1). relu, of generalised
    attention (2.2): (max(w x, 0) + EPSILON) / sqrt(M).
    """
    x = x.astype(jnp.float32)
    # Exponents: at the accelerators' default precision they would be off by per cents.
    along = jnp.einsum("...e,me->...m", x, projection, precision=lax.Precision.HIGHEST)
    return KERNELS[kernel](along, x) - math.log(projection.shape[0]) / 2


def projection(
    features: int,
    width: int,
    *,
    orthogonal: bool = True,
    seed: int = 0,
    rng: Array | None = None,
) -> Array | np.ndarray:
    """Rows w, float32 [M, E], each of them standard normal.

    Orthogonal (2.4): each E of them at right angles, which takes from the variance of
    the estimate. Without `rng` they depend on `seed` alone, on every device and in
    every version of NumPy.
    """
    if rng is None:
        return _of_seed(features, width, orthogonal, seed)
    normal = jax.random.normal(rng, _shape(features, width, orthogonal))
    return _at_right_angles(normal, features, jnp) if orthogonal else normal


def _shape(features: int, width: int, orthogonal: bool) -> tuple[int, int]:
    """Of the normal numbers that are needed: norms' rows, then directions' blocks."""
    blocks = -(-features // width) if orthogonal else 0
    return features + blocks * width, width


@functools.cache
def _of_seed(features: int, width: int, orthogonal: bool, seed: int) -> np.ndarray:
    # The old generator: NumPy has frozen its stream, and trained weights belong to it.
    rng = np.random.RandomState(seed)
    rows = rng.standard_normal(_shape(features, width, orthogonal))
    if orthogonal:
        rows = _at_right_angles(rows, features, np)
    rows = rows.astype(np.float32)
    rows.setflags(write=False)
    return rows


def _at_right_angles(normal, features: int, xp):
    """The norms of the first M rows, the directions of QR of the rest, E by E."""
    width = normal.shape[1]
    blocks = normal[features:].reshape(-1, width, width)
    if xp is np:
        q, r = np.linalg.qr(blocks)
    else:
        # One by one: of a batch on CPUs each of jaxlib's threads waits for others to
        # take their share, and two layers at once wait for each other for ever.
        q, r = jax.lax.map(jnp.linalg.qr, blocks)
    # LAPACK takes signs from the first entries: unless R's diagonal is made positive, q
    # is not uniform (Mezzadri 2007, 5) and the estimate of the kernel is biased.
    q = q * xp.sign(xp.diagonal(r, axis1=1, axis2=2))[:, None]
    directions = q.swapaxes(1, 2).reshape(-1, width)[:features]
    return directions * xp.linalg.norm(normal[:features], axis=1, keepdims=True)
