"""A model whose every logit is in a table, decoded; for tests of decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from triform.models import decode
from triform.models.decode import DecodeConfig

PAD, EOS = 0, 1
VOCAB, LENGTH, ROWS = 4, 4, 3


@struct.dataclass
class Toy:
    """The cache of a model whose next token depends on the last two, row and place."""

    row: jax.Array
    before: jax.Array

    def map_rows(self, fn, *, memory=True):
        return Toy(fn(self.row) if memory else self.row, fn(self.before))


@struct.dataclass
class NoCache:
    """For logits that do not depend on the text."""

    def map_rows(self, change, memory=True):
        return self


def toy_table(seed=0, vocab=VOCAB, length=LENGTH, eos=0.0):
    """Logits [row, place, token before, token, next]; EOS gets `eos` more."""
    rng = np.random.default_rng(seed)
    table = 2 * rng.standard_normal((ROWS, length, vocab, vocab, vocab))
    table[..., EOS] += eos
    return table.astype(np.float32)


def run_toy(table, rows, **options):
    """(tokens [B, length], scores [B]) of the rows of a table."""
    return run_all(table, rows, **options)[:2]


def run_all(table, rows, eos=EOS, **options):
    """The same, and log-probabilities of the tokens [B, length]."""
    key = tuple(sorted(vars(DecodeConfig(**options)).items()))
    return _compiled(key, table.shape, eos)(table, np.array(rows))


@functools.cache
def _compiled(key, shape, eos):
    config = DecodeConfig(**dict(key))

    @jax.jit
    def run(table, rows):
        def extend(tokens, positions, cache):
            token, place = tokens[:, 0], positions[:, 0]
            logits = table[cache.row, place, cache.before, token]
            return logits[:, None], cache.replace(before=token)

        zeros = jnp.zeros(rows.shape, jnp.int32)
        return decode.generate(
            config,
            extend,
            Toy(rows, zeros),
            zeros,
            zeros,
            eos=eos,
            length=shape[1],
            rng=jax.random.key(0),
        )

    return run
