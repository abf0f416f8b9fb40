"""Greedy search, sampling and beam search over an explicit cache.

All take `extend(tokens [B, l], positions [B, l], cache) -> (logits [B, l, V], cache)`
and a cache whose rows hold what has been read so far. All are pure and can be jitted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Extend = Callable[[Array, Array, Any], tuple[Array, Any]]
METHODS = ("greedy", "beam", "sample")
NEVER = -1e9  # finite, so that sums of it stay finite


@dataclasses.dataclass
class DecodeConfig:
    """How text is generated."""

    method: str = "beam"  # how a text is chosen
    beam_size: int = 4  # hypotheses kept at each step
    length_penalty: float = 0.6  # alpha of Wu et al. 2016, eq. 14
    temperature: float = 1.0  # the rest: sampling only
    top_k: int = 0  # sample among the k likeliest; 0: all
    top_p: float = 1.0  # sample among the likeliest that hold this probability
    max_len: int = 0  # tokens at most; 0: data.max_len
    banned: tuple[int, ...] = ()  # ids that are never written

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""

        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"decode.{name}={getattr(self, name)!r}: {rule}")

        rule = f"expected one of {', '.join(METHODS)}"
        require(self.method in METHODS, "method", rule)
        require(self.beam_size >= 1, "beam_size", "must be at least 1")
        require(self.length_penalty >= 0, "length_penalty", "must not be negative")
        require(self.temperature > 0, "temperature", "must be positive")
        require(self.top_k >= 0, "top_k", "must not be negative; 0 is off")
        require(0 < self.top_p <= 1, "top_p", "must lie in (0, 1]; 1 is off")
        require(self.max_len >= 0, "max_len", "must not be negative; 0: data.max_len")
        ids = all(isinstance(i, int) and i >= 0 for i in self.banned)
        require(ids, "banned", "must be a tuple of ids")


def generate(
    config: DecodeConfig,
    extend: Extend,
    cache: Any,
    first: Array,
    positions: Array,
    *,
    eos: int,
    length: int,
    rng: Array,
) -> tuple[Array, Array]:
    """Continues every row; returns (tokens int32 [B, length], log-probabilities [B]).

    `first` and `positions` int32 [B] are the token to feed first and its position. The
    tokens end with `eos` where it was reached, then zeros.
    """
    if config.method == "beam":
        return beam_search(config, extend, cache, first, positions, eos, length)
    text = begin(cache, first, positions, length, rng)
    text = advance(config, extend, text, eos, length)
    return text.tokens, text.score


@struct.dataclass
class Text:
    """What is being written: `tokens` [B, length], of which `count` are there."""

    count: Array  # int32 []
    tokens: Array  # int32 [B, length]
    score: Array  # float32 [B]: log-probabilities so far
    done: Array  # bool [B]
    last: Array  # int32 [B]: to be fed next
    positions: Array  # int32 [B]: of `last`
    cache: Any
    rng: Array


def begin(cache: Any, first: Array, positions: Array, length: int, rng: Array) -> Text:
    """Nothing written yet; see `generate`."""
    batch = first.shape[0]
    tokens = jnp.zeros((batch, length), jnp.int32)
    score, done = jnp.zeros(batch), jnp.zeros(batch, bool)
    return Text(jnp.int32(0), tokens, score, done, first, positions, cache, rng)


def advance(
    config: DecodeConfig, extend: Extend, text: Text, eos: int, until: Array | int
) -> Text:
    """Writes on until `until` tokens are there or every row has ended.

    In one go or in several, the tokens are the same: streaming shows what a single call
    would give.
    """
    pick = greedy if config.method == "greedy" else sampler(config)

    def body(t: Text) -> Text:
        rng, key = jax.random.split(t.rng)
        logits, cache = extend(t.last[:, None], t.positions[:, None], t.cache)
        logp = without_banned(config, jax.nn.log_softmax(logits[:, 0]))
        token = jnp.where(t.done, 0, pick(key, logp))
        gained = jnp.take_along_axis(logp, token[:, None], 1)[:, 0]
        return Text(
            count=t.count + 1,
            tokens=t.tokens.at[:, t.count].set(token),
            score=t.score + jnp.where(t.done, 0.0, gained),
            done=t.done | (token == eos),
            last=token,
            positions=t.positions + 1,
            cache=cache,
            rng=rng,
        )

    def going(t: Text) -> Array:
        return (t.count < until) & ~t.done.all()

    return jax.lax.while_loop(going, body, text)


def without_banned(config: DecodeConfig, logp: Array) -> Array:
    """logp [..., V] with NEVER for the ids that are never written."""
    if not config.banned:
        return logp
    return logp.at[..., np.array(config.banned)].set(NEVER)


def greedy(key: Array, logp: Array) -> Array:
    """The likeliest token of logp [B, V]."""
    return logp.argmax(-1).astype(jnp.int32)


def sampler(config: DecodeConfig) -> Callable[[Array, Array], Array]:
    """Draws from logp [B, V]: temperature, then top-k, then top-p (Holtzman 2020)."""

    def draw(key: Array, logp: Array) -> Array:
        logits = logp / config.temperature
        if config.top_k:
            k = min(config.top_k, logits.shape[-1])
            least = jax.lax.top_k(logits, k)[0][:, -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if config.top_p < 1:
            ordered = -jnp.sort(-logits, -1)
            probability = jax.nn.softmax(ordered)
            # The likeliest tokens before which less than top_p has been collected.
            inside = jnp.cumsum(probability, -1) - probability < config.top_p
            least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    return draw


def length_norm(length: Array | int, alpha: float) -> Array:
    """((5 + length) / 6) ** alpha (Wu et al. 2016, eq. 14)."""
    return ((5.0 + length) / 6.0) ** alpha


def beam_search(
    config: DecodeConfig,
    extend: Extend,
    cache: Any,
    first: Array,
    positions: Array,
    eos: int,
    length: int,
) -> tuple[Array, Array]:
    """The hypothesis with the best log-probability / length_norm of every row.

    Keeps beam_size live and beam_size finished hypotheses a row. Stops when no live one
    can still beat the best finished one. Returns ([B, length], score [B]).
    """
    batch, beams = first.shape[0], config.beam_size
    alpha = config.length_penalty

    def flat(x: Array) -> Array:
        return x.reshape(batch * beams, *x.shape[2:])

    def take(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(
            x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1
        )

    cache = cache.map_rows(lambda x: jnp.repeat(x, beams, 0))
    positions = jnp.repeat(positions, beams)
    rows = jnp.arange(batch)[:, None] * beams

    def body(carry):
        i, token, cache, live, live_logp, done, done_score = carry
        logits, cache = extend(flat(token)[:, None], (positions + i)[:, None], cache)
        logp = without_banned(config, jax.nn.log_softmax(logits[:, 0]))
        logp = logp.reshape(batch, beams, -1)
        vocab = logp.shape[-1]
        total = (live_logp[..., None] + logp).reshape(batch, beams * vocab)
        # 2 * beams candidates: at least `beams` of them do not end.
        score, index = jax.lax.top_k(total, 2 * beams)
        parent, token = index // vocab, index % vocab
        grown = take(live, parent).at[:, :, i].set(token)
        ends = token == eos

        ended = jnp.where(ends, score / length_norm(i + 1, alpha), NEVER)
        pool = jnp.concatenate([done, grown], 1)
        done_score, best = jax.lax.top_k(jnp.concatenate([done_score, ended], 1), beams)
        done = take(pool, best)

        live_logp, best = jax.lax.top_k(jnp.where(ends, NEVER, score), beams)
        live, token, parent = (take(x, best) for x in (grown, token, parent))
        chosen = (rows + parent).reshape(-1)
        cache = cache.map_rows(lambda x: x[chosen], memory=False)
        return i + 1, token, cache, live, live_logp, done, done_score

    def unfinished(carry) -> Array:
        i, _, _, _, live_logp, _, done_score = carry
        # Log-probabilities only fall; the longest length is the mildest divisor.
        hope = live_logp.max(-1) / length_norm(length, alpha)
        return (i < length) & (hope > done_score[:, 0]).any()

    empty = jnp.zeros((batch, beams, length), jnp.int32)
    # At first all beams are equal: only one may live.
    start_logp = jnp.full((batch, beams), NEVER).at[:, 0].set(0.0)
    carry = (
        jnp.int32(0),
        jnp.broadcast_to(first[:, None], (batch, beams)),
        cache,
        empty,
        start_logp,
        empty,
        jnp.full((batch, beams), NEVER),
    )
    _, _, _, live, live_logp, done, done_score = jax.lax.while_loop(
        unfinished, body, carry
    )
    # A row where nothing ended in time gives its best unfinished hypothesis.
    ended = done_score[:, 0] > NEVER / 2
    tokens = jnp.where(ended[:, None], done[:, 0], live[:, 0])
    live_score = live_logp[:, 0] / length_norm(length, alpha)
    return tokens, jnp.where(ended, done_score[:, 0], live_score)
