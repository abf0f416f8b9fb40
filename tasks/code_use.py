"""How the entries of a codebook are used, over a whole evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from triform.runtime.metrics import Metric

Array = jax.Array


def histogram(codes: Array, weights: Array, size: int) -> Array:
    """float32 [size]: how often each code is in the real rows of codes [B, ...]."""
    each = jnp.broadcast_to(weights[:, None], (len(codes), codes[0].size))
    return jnp.zeros(size).at[codes.reshape(-1)].add(each.reshape(-1))


@struct.dataclass
class UsePerplexity(Metric):
    """exp of the entropy of the codes' frequencies; `total` [K] are their counts."""

    def value(self) -> float:
        """Between 1, one code is used, and K, all are used alike."""
        counts = np.asarray(self.total, np.float64)
        shares = counts[counts > 0] / max(counts.sum(), 1e-300)
        return float(np.exp(-(shares * np.log(shares)).sum()))


@struct.dataclass
class CodesUsed(Metric):
    """How many codes occur; `total` [K] are their counts."""

    def value(self) -> float:
        """A number between 1 and K."""
        return float((np.asarray(self.total) > 0).sum())
