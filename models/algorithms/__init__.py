"""Attention algorithms: pure functions of one signature, in a literal table.

    fn(q [B, L, H, E], k [B, S, K, E], v [B, S, K, E], mask, *, scale,
       bias=None [B or 1, H, L, S], rng=None, dropout=0.0) -> [B, L, H, E]

A query that may see no key gets zeros. What an algorithm cannot do it refuses with an
error that names the alternative. To add one: a file here and a row in ALGORITHMS.
"""

from triform.models.algorithms.dot import dot

ALGORITHMS = {"dot": dot}
