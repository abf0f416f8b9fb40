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

from triform.models import repeats
from triform.models.repeats import NEVER

Array = jax.Array
Extend = Callable[[Array, Array, Any], tuple[Array, Any]]
Ends = int | tuple[int, ...]  # the ids that end a text
METHODS = ("greedy", "beam", "sample")
BLOCK = 128  # entries that `best` takes together


@dataclasses.dataclass
class DecodeConfig:
    """How text is generated."""

    method: str = "beam"  # how a text is chosen
    beam_size: int = 4  # hypotheses kept at each step; 1: greedy search
    length_penalty: float = 0.6  # alpha of Wu et al. 2016, eq. 14
    temperature: float = 1.0  # the rest: sampling only
    top_k: int = 0  # sample among the k likeliest; 0: all
    top_p: float = 1.0  # sample among the likeliest that hold this probability
    # Of pictures: how far from what is drawn without the text; 1: as the model says
    guidance: float = 1.0
    max_len: int = 0  # tokens at most; 0: data.max_len
    banned: tuple[int, ...] = ()  # ids that are never written
    # Of tokens read or written logits above 0 are divided by it, others multiplied; 1:
    # off
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0  # so many tokens in a row never come twice; 0: off

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
        require(self.guidance >= 0, "guidance", "must not be negative; 1 is off")
        require(self.max_len >= 0, "max_len", "must not be negative; 0: data.max_len")
        ids = all(isinstance(i, int) and i >= 0 for i in self.banned)
        require(ids, "banned", "must be a tuple of ids")
        rule = "must be positive; 1 is off"
        require(self.repetition_penalty > 0, "repetition_penalty", rule)
        rule = "must not be negative; 0 is off"
        require(self.no_repeat_ngram >= 0, "no_repeat_ngram", rule)


def generate(
    config: DecodeConfig,
    extend: Extend,
    cache: Any,
    first: Array,
    positions: Array,
    *,
    eos: Ends,
    length: int,
    rng: Array,
    read: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Continues every row.

    Returns (tokens int32 [B, length], score of each text [B], log-probability of each
    token [B, length]). `first` and `positions` int32 [B] are the token to feed first
    and its position; `rng` is a key, or one a row. `read` int32 [B, P] is what was
    read, for penalties (`repeats.restrained`); None: `first` alone. The tokens end with
    one of `eos` where it was reached, then zeros. One beam is greedy search.
    """
    start = cache, first, positions
    if config.method == "beam" and config.beam_size > 1:
        return beam_search(config, extend, *start, eos, length, read)
    text = begin(*start, length, rng, read=read)
    text = advance(config, extend, text, eos, length)
    return text.tokens, text.logp.sum(-1), text.logp


@struct.dataclass
class Text:
    """What is being written: `tokens` [B, length], of which `count` are there."""

    count: Array  # int32 []
    tokens: Array  # int32 [B, length]
    logp: Array  # float32 [B, length]: of every token; 0 where none is
    done: Array  # bool [B]: ended
    last: Array  # int32 [B]: to be fed next
    positions: Array  # int32 [B]: of `last`
    cache: Any
    keys: Array  # [B]
    before: Array  # int32 [B]: tokens that each text has from an earlier call
    read: Array  # int32 [B, P]: what a penalty looks at besides `tokens`


def begin(
    cache: Any,
    first: Array,
    positions: Array,
    length: int,
    rng: Array,
    before: Array | int = 0,
    read: Array | None = None,
) -> Text:
    """Nothing written yet; see `generate`.

    Token t of a text, counted from `before`, is drawn with fold_in(its key, t): it
    depends neither on other rows nor on how a text is divided into calls.
    """
    batch = first.shape[0]
    tokens = jnp.zeros((batch, length), jnp.int32)
    logp, done = jnp.zeros((batch, length)), jnp.zeros(batch, bool)
    if rng.ndim == 0:
        rng = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(batch))
    before = jnp.broadcast_to(jnp.asarray(before, jnp.int32), (batch,))
    count = jnp.int32(0)
    read = first[:, None] if read is None else read
    return Text(count, tokens, logp, done, first, positions, cache, rng, before, read)


def advance(
    config: DecodeConfig, extend: Extend, text: Text, eos: Ends, until: Array | int
) -> Text:
    """Writes on until `until` tokens are there ([] or, of each row, [B]) or every row
    has ended.

    In one go or in several, the tokens are the same: streaming shows what a single call
    would give. A row must not be continued after others have gone beyond its `until`.
    """
    pick = sampler(config) if config.method == "sample" else greedy

    def resting(t: Text) -> Array:
        return t.done | (t.count >= until)

    def body(t: Text) -> Text:
        rests = resting(t)
        logits, cache = extend(t.last[:, None], t.positions[:, None], t.cache)
        logp = without_banned(config, jax.nn.log_softmax(logits[:, 0]))
        wanted = logp
        if repeats.acts(config):  # of logits: what is divided must not be shifted
            wanted = logits[:, 0], t.read, t.tokens, t.count
            wanted = without_banned(config, repeats.restrained(config, *wanted))
        keys = jax.vmap(jax.random.fold_in)(t.keys, t.before + t.count)
        token = jnp.where(rests, 0, pick(keys, wanted))
        gained = jnp.take_along_axis(logp, token[:, None], 1)[:, 0]
        return t.replace(
            count=t.count + 1,
            tokens=t.tokens.at[:, t.count].set(token),
            logp=t.logp.at[:, t.count].set(jnp.where(rests, 0.0, gained)),
            done=t.done | (ends(token, eos) & ~rests),
            last=jnp.where(rests, t.last, token),
            positions=t.positions + ~rests,
            cache=cache,
        )

    return jax.lax.while_loop(lambda t: ~resting(t).all(), body, text)


def ends(token: Array, eos: Ends) -> Array:
    """bool like `token`: which of them end a text."""
    return jnp.isin(token, jnp.atleast_1d(jnp.asarray(eos, jnp.int32)))


def without_banned(config: DecodeConfig, logp: Array) -> Array:
    """logp [..., V] with NEVER for the ids that are never written."""
    if not config.banned:
        return logp
    never = np.isin(np.arange(logp.shape[-1]), config.banned)
    return jnp.where(never, NEVER, logp)


def greedy(keys: Array, logp: Array) -> Array:
    """The likeliest token of logp [B, V]; of equal ones the first.

    Not argmax: on CPUs XLA compares pairs of number and index one by one.
    """
    vocab = logp.shape[-1]
    best = logp == logp.max(-1, keepdims=True)
    first = jnp.where(best, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return first.min(-1)


def sampler(config: DecodeConfig) -> Callable[[Array, Array], Array]:
    """Draws from logp [B, V] with keys [B]: temperature, then top-k, then top-p
    (Holtzman 2020).
    """

    def draw(keys: Array, logp: Array) -> Array:
        logits = logp / config.temperature
        if config.top_k:
            k = min(config.top_k, logits.shape[-1])
            least = best(logits[:, None], k)[0][:, -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if config.top_p < 1:
            ordered = -jnp.sort(-logits, -1)
            probability = jax.nn.softmax(ordered)
            # The likeliest tokens before which less than top_p has been collected.
            inside = jnp.cumsum(probability, -1) - probability < config.top_p
            least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    return draw


def best(x: Array, count: int) -> tuple[Array, Array]:
    """What lax.top_k gives for x [B, W, V] as [B, W * V], the order of equal entries
    included.

    XLA's looks at every entry one by one on CPUs. Here it looks at the maxima of blocks
    and at the blocks of the greatest ones: no entry of another can be among the best.
    """
    batch, beams, vocab = x.shape
    blocks, whole = -(-vocab // BLOCK), vocab // BLOCK * BLOCK
    flat = x.reshape(batch, -1)
    if beams * blocks < 2 * count:
        return jax.lax.top_k(flat, count)
    parts = [x[..., :whole].reshape(batch, beams, -1, BLOCK), x[..., None, whole:]]
    peaks = jnp.concatenate([p.max(-1) for p in parts if p.size], -1)
    # Ascending: of equal entries the first comes first.
    which = jnp.sort(jax.lax.top_k(peaks.reshape(batch, -1), count)[1], -1)[..., None]
    entry = which % blocks * BLOCK + jnp.arange(BLOCK)
    index = (which // blocks * vocab + jnp.minimum(entry, vocab - 1)).reshape(batch, -1)
    inside = (entry < vocab).reshape(batch, -1)
    values = jnp.where(inside, jnp.take_along_axis(flat, index, 1), -jnp.inf)
    found, at = jax.lax.top_k(values, count)
    return found, jnp.take_along_axis(index, at, 1)


def length_norm(length: Array | int, alpha: float) -> Array:
    """((5 + length) / 6) ** alpha (Wu et al. 2016, eq. 14)."""
    return ((5.0 + length) / 6.0) ** alpha


def take(tree: Any, index: Array) -> Any:
    """The entries `index` [B, n] of the second axis of all arrays [B, N, ...]."""

    def one(x: Array) -> Array:
        shape = *index.shape, *(1,) * (x.ndim - 2)
        return jnp.take_along_axis(x, index.reshape(shape), 1)

    return jax.tree.map(one, tree)


def beam_search(
    config: DecodeConfig,
    extend: Extend,
    cache: Any,
    first: Array,
    positions: Array,
    eos: Ends,
    length: int,
    read: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The hypothesis with the best log-probability / length_norm of every row.

    Keeps beam_size live and beam_size finished hypotheses a row. Stops when no live one
    can still beat the best finished one. Returns (tokens [B, length], score [B],
    log-probability of each token [B, length]). Penalties change scores, not these.
    """
    batch, beams = first.shape[0], config.beam_size
    alpha = config.length_penalty

    cache = cache.map_rows(lambda x: jnp.repeat(x, beams, 0))
    positions = jnp.repeat(positions, beams)
    read = jnp.repeat(first[:, None] if read is None else read, beams, 0)
    rows = jnp.arange(batch)[:, None] * beams

    def body(carry):
        i, token, cache, live, live_logp, done, done_score = carry
        logits, cache = extend(token.reshape(-1, 1), (positions + i)[:, None], cache)
        logp = without_banned(config, jax.nn.log_softmax(logits[:, 0]))
        written = live[0].reshape(batch * beams, -1)
        wanted = repeats.restrained(config, logp, read, written, i)
        logp, wanted = (x.reshape(batch, beams, -1) for x in (logp, wanted))
        vocab = logp.shape[-1]
        total = live_logp[..., None] + wanted
        # So many candidates that at least `beams` of them do not end.
        score, index = best(total, beams * min(vocab, 1 + np.size(eos)))
        parent, token = index // vocab, index % vocab
        gained = jnp.take_along_axis(logp.reshape(batch, -1), index, 1)
        tokens, gains = take(live, parent)
        grown = tokens.at[:, :, i].set(token), gains.at[:, :, i].set(gained)
        over = ends(token, eos)

        ended = jnp.where(over, score / length_norm(i + 1, alpha), NEVER)
        pool = jax.tree.map(lambda *x: jnp.concatenate(x, 1), done, grown)
        ended = jnp.concatenate([done_score, ended], 1)
        done_score, which = jax.lax.top_k(ended, beams)
        done = take(pool, which)

        live_logp, which = jax.lax.top_k(jnp.where(over, NEVER, score), beams)
        live, token, parent = (take(x, which) for x in (grown, token, parent))
        chosen = (rows + parent).reshape(-1)
        cache = cache.map_rows(lambda x: x[chosen], memory=False)
        return i + 1, token, cache, live, live_logp, done, done_score

    def unfinished(carry) -> Array:
        i, _, _, _, live_logp, _, done_score = carry
        # Log-probabilities only fall; the longest length is the mildest divisor.
        hope = live_logp.max(-1) / length_norm(length, alpha)
        return (i < length) & (hope > done_score[:, 0]).any()

    shape = (batch, beams, length)
    empty = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
    # At first all beams are equal: only one may live.
    never = jnp.full((batch, beams), NEVER)
    token = jnp.broadcast_to(first[:, None], (batch, beams))
    start_logp = never.at[:, 0].set(0.0)
    carry = jnp.int32(0), token, cache, empty, start_logp, empty, never
    _, _, _, live, live_logp, done, done_score = jax.lax.while_loop(
        unfinished, body, carry
    )
    # A row where nothing ended in time gives its best unfinished hypothesis.
    ended = done_score[:, 0] > NEVER / 2
    tokens, gains = (
        jnp.where(ended[:, None], over[:, 0], going[:, 0])
        for over, going in zip(done, live, strict=True)
    )
    live_score = live_logp[:, 0] / length_norm(length, alpha)
    return tokens, jnp.where(ended, done_score[:, 0], live_score), gains
