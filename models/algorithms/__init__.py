"""Attention algorithms: pure functions of one signature, in a literal table.

    fn(q [B, L, H, E], k [B, S, K, E], v [B, S, K, E], mask, *, scale,
       bias=None [B or 1, H, L, S], rng=None, dropout=0.0, **options) -> [B, L, H, E]

A query that may see no key gets zeros. What an algorithm cannot do it refuses with
`models.mask.Refused`, which names the alternative. `rng` is there in training. Further
keyword arguments are options (`attention_options` of the trunk), but for `of_globals`:
an algorithm that has it gets (q, k, v) from projections of their own where the mask has
global tokens.

To add one: a file here and a row in ALGORITHMS; if its cached decoding needs no keys
and values, the class of what it needs instead in STATES.
"""

import inspect
from collections.abc import Callable

from triform.models.algorithms.dot import dot
from triform.models.algorithms.flash import flash
from triform.models.algorithms.local import local
from triform.models.algorithms.performer import PerformerState, performer

ALGORITHMS = {"dot": dot, "flash": flash, "local": local, "performer": performer}

# What decoding carries for one layer, instead of keys and values. See models/cache.py.
STATES = {"performer": PerformerState}

_SIGNATURE = ("q", "k", "v", "mask", "scale", "bias", "rng", "dropout", "of_globals")


def options(algorithm: Callable) -> list[str]:
    """The names of an algorithm's options."""
    names = inspect.signature(algorithm).parameters
    return [name for name in names if name not in _SIGNATURE]


def has_globals(algorithm: Callable) -> bool:
    """Whether its global tokens have projections of their own."""
    return "of_globals" in inspect.signature(algorithm).parameters
