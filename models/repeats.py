"""What a text may not say again, by what was read and written before.

As transformers does it, so that an imported model writes the same text.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
NONE = -1  # in a history: no token
NEVER = -1e9  # finite, so that sums of it stay finite


def acts(config: Any) -> bool:
    """Do settings of decoding look at the history of a text?"""
    return config.repetition_penalty != 1 or config.no_repeat_ngram > 0


def restrained(config: Any, logits: Array, before: Array, new: Array, at: Any) -> Array:
    """Logits (or log-probabilities) [B, V] of the next token, lower for repeats.

    `before` int32 [B, P] was read, its last token at the end and NONE where there is
    none; of `new` int32 [B, N] the first `at` were written after it.
    """
    if not acts(config):
        return logits
    new = jnp.where(jnp.arange(new.shape[1]) < at, new, NONE)
    history, penalty = jnp.concatenate([before, new], 1), config.repetition_penalty
    if penalty != 1:  # Keskar et al. 2019, 4.1
        lower = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(_among(history, logits), lower, logits)
    if config.no_repeat_ngram:  # Paulus et al. 2018, 2.5
        ended = _continued(history, before.shape[1] + at, config.no_repeat_ngram)
        logits = jnp.where(_among(ended, logits), NEVER, logits)
    return logits


def _among(tokens: Array, logits: Array) -> Array:
    """bool [B, V]: which ids are among tokens [B, H]."""
    rows, vocab = logits.shape
    tokens = jnp.where(tokens == NONE, vocab, tokens)
    found = jnp.zeros((rows, vocab + 1), bool)
    return found.at[jnp.arange(rows)[:, None], tokens].set(True)[:, :vocab]


def _continued(history: Array, end: Any, n: int) -> Array:
    """int32 [B, H - n + 1]: what followed the last n - 1 tokens before `end` when they
    came earlier; else NONE.
    """
    size = history.shape[1]
    follows = history[:, n - 1 :]
    if size < n:
        return follows
    last = jax.lax.dynamic_slice_in_dim(history, end - (n - 1), n - 1, 1)
    same = (last != NONE).all(1, keepdims=True)
    for i in range(n - 1):
        same &= history[:, i : size - n + 1 + i] == last[:, i : i + 1]
    return jnp.where(same, follows, NONE)
