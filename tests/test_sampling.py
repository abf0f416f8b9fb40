"""Sampling, and texts that are written in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_decoder import EOS, ROWS, Toy, run_toy, toy_table

from triform.models import decode
from triform.models.decode import DecodeConfig

METHODS = ({"method": "greedy"}, {"method": "sample"})


# --- Sampling ---

LOGP = np.log(np.array([0.35, 0.05, 0.25, 0.2, 0.1, 0.05])).astype(np.float32)


def expected_distribution(temperature, top_k, top_p):
    p = np.exp(LOGP.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    collected = np.cumsum(p[order]) - p[order]  # before each
    p[order[collected >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.5, 0, 1), (2, 0, 1), (1, 3, 1), (1, 0, 0.7), (1.5, 4, 0.6)],
)
def test_sampled_frequencies(temperature, top_k, top_p):
    config = DecodeConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = 100_000
    rows = np.broadcast_to(LOGP, (draws, len(LOGP)))
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(decode.sampler(config))(keys, rows)
    seen = np.bincount(tokens, minlength=len(LOGP)) / draws
    p = expected_distribution(temperature, top_k, top_p)
    assert ((p == 0) == (seen == 0)).all()
    assert (np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_draws_of_places_and_rows_are_independent():
    rows, length = 20_000, 3

    def extend(tokens, positions, cache):
        return jnp.broadcast_to(LOGP, (rows, 1, len(LOGP))), cache

    zeros = jnp.zeros(rows, jnp.int32)
    config = DecodeConfig(method="sample")
    rest = {"eos": len(LOGP), "length": length, "rng": jax.random.key(0)}
    run = jax.jit(lambda: decode.generate(config, extend, (), zeros, zeros, **rest))
    tokens = np.asarray(run()[0])
    p = np.exp(LOGP.astype(np.float64))
    p = np.outer(p / p.sum(), p / p.sum()).ravel()
    pairs = [(tokens[:, i], tokens[:, i + 1]) for i in range(length - 1)]
    pairs.append((tokens[:-1].ravel(), tokens[1:].ravel()))
    for first, second in pairs:
        seen = np.bincount(first * len(LOGP) + second, minlength=p.size) / len(first)
        assert (np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / len(first))).all()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_one_token_is_greedy(options):
    table = toy_table(eos=-1.0)
    greedy = run_toy(table, range(ROWS), method="greedy")
    sampled = run_toy(table, range(ROWS), method="sample", **options)
    np.testing.assert_array_equal(sampled[0], greedy[0])
    np.testing.assert_allclose(sampled[1], greedy[1], rtol=1e-6)


def test_top_k_above_the_vocabulary_is_off():
    rows = np.broadcast_to(LOGP, (100, len(LOGP)))
    keys = jax.random.split(jax.random.key(0), len(rows))
    draws = [
        decode.sampler(DecodeConfig(top_k=k))(keys, rows) for k in (0, len(LOGP), 1000)
    ]
    np.testing.assert_array_equal(draws[1], draws[0])
    np.testing.assert_array_equal(draws[2], draws[0])


@pytest.mark.parametrize("options", METHODS)
def test_pieces_of_texts_that_end(options):
    """The same with rows that end at different places."""
    config, ends = DecodeConfig(**options), set()
    table = jnp.asarray(toy_table(3, length=8, eos=-0.5))

    def extend(tokens, positions, cache):
        token, place = tokens[:, 0], positions[:, 0]
        logits = table[cache.row, place, cache.before, token]
        return logits[:, None], cache.replace(before=token)

    advance = jax.jit(lambda text, n: decode.advance(config, extend, text, EOS, n))
    zeros = jnp.zeros(ROWS, jnp.int32)
    for seed in range(10):
        toy = Toy(jnp.arange(ROWS), zeros)
        start = decode.begin(toy, zeros, zeros, 8, jax.random.key(seed))
        whole, text = advance(start, 8), start
        for until in range(1, 9):
            text = advance(text, until)
        for a, b in zip(
            (text.tokens, text.logp, text.count, text.done),
            (whole.tokens, whole.logp, whole.count, whole.done),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        ends |= {x.index(EOS) for x in whole.tokens.tolist() if EOS in x}
    assert len(ends) > 1


def test_what_a_row_draws_is_its_own():
    """Other rows, their number and the division into calls change nothing."""
    config = DecodeConfig(method="sample")
    table = jnp.asarray(toy_table(5, length=8, eos=-9.0))

    def extend(tokens, positions, cache):
        token, place = tokens[:, 0], positions[:, 0]
        return table[cache.row, place, cache.before, token][:, None], cache.replace(
            before=token
        )

    def written(rows, stops):
        """Tokens of rows, in as many calls as there are stops."""
        rows = jnp.array(rows)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), rows)
        toy, zeros = Toy(rows, jnp.zeros_like(rows)), jnp.zeros_like(rows)
        first, positions, parts, at = zeros, zeros, [], 0
        for stop in stops:
            text = decode.begin(toy, first, positions, stop - at, keys, at)
            text = decode.advance(config, extend, text, EOS, stop - at)
            parts.append(np.asarray(text.tokens))
            toy, first, positions, at = text.cache, text.last, text.positions, stop
        return np.concatenate(parts, 1)

    together = written([0, 1, 2], [8])
    assert len({*map(tuple, together.tolist())}) == ROWS
    np.testing.assert_array_equal(written([0, 1, 2], [3, 8]), together)
    for row in range(ROWS):
        np.testing.assert_array_equal(written([row, row], [8])[0], together[row])


def test_a_row_rests_at_its_own_limit():
    config = DecodeConfig(method="greedy")
    table = jnp.asarray(toy_table(4, length=8, eos=-9.0))

    def extend(tokens, positions, cache):
        token, place = tokens[:, 0], positions[:, 0]
        return table[cache.row, place, cache.before, token][:, None], cache.replace(
            before=token
        )

    zeros, limits = jnp.zeros(ROWS, jnp.int32), np.array([2, 0, 7])
    toy = Toy(jnp.arange(ROWS), zeros)
    start = decode.begin(toy, zeros, zeros, 8, jax.random.key(0))
    whole = decode.advance(config, extend, start, EOS, 8)
    text = decode.advance(config, extend, start, EOS, limits)
    assert int(text.count) == 7
    np.testing.assert_array_equal(text.positions, limits)
    for row, limit in enumerate(limits):
        np.testing.assert_array_equal(
            text.tokens[row, :limit], whole.tokens[row, :limit]
        )
        assert not text.tokens[row, limit:].any()
        assert not text.logp[row, limit:].any()
