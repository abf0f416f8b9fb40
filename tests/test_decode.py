"""Decoding: greedy, beam search and sampling against what they claim to compute."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from triform import decode, models
from triform.decode import DecodeConfig

PAD, EOS = 0, 1
VOCAB, LENGTH, ROWS = 4, 4, 3


@struct.dataclass
class Toy:
    """The cache of a model whose next token depends on the last two, row and place."""

    row: jax.Array
    before: jax.Array

    def map_rows(self, fn, *, memory=True):
        return Toy(fn(self.row) if memory else self.row, fn(self.before))


def toy_table(seed=0, vocab=VOCAB, length=LENGTH, eos=0.0):
    """Logits [row, place, token before, token, next]; EOS gets `eos` more."""
    rng = np.random.default_rng(seed)
    table = 2 * rng.standard_normal((ROWS, length, vocab, vocab, vocab))
    table[..., EOS] += eos
    return table.astype(np.float32)


def run_toy(table, rows, **options):
    """(tokens [B, length], scores [B]) of the rows of a table."""
    return _toy(DecodeConfig(**options), table.shape)(table, np.array(rows))


@functools.cache
def _compiled(key, shape):
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
            eos=EOS,
            length=shape[1],
            rng=jax.random.key(0),
        )

    return run


def _toy(config, shape):
    return _compiled(tuple(sorted(vars(config).items())), shape)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_probability(table, row, tokens):
    """Of a hypothesis up to its first EOS, and its number of tokens."""
    total, before, last = 0.0, 0, 0
    for place, token in enumerate(tokens):
        total += log_softmax(table[row, place, before, last])[token]
        before, last = last, token
        if token == EOS:
            return total, place + 1
    return total, len(tokens)


def norm(length, alpha):
    return ((5 + length) / 6) ** alpha  # Wu et al. 2016, eq. 14


def hypotheses(vocab, length):
    """All that end with EOS within `length` tokens, padded with zeros."""
    others = [t for t in range(vocab) if t != EOS]
    for n in range(length):
        for body in itertools.product(others, repeat=n):
            yield (*body, EOS, *(PAD,) * (length - n - 1))


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_wide_beam_is_exhaustive_search(alpha):
    table = toy_table(eos=-1.0)
    wide = 3**LENGTH  # every prefix without EOS
    tokens, scores = run_toy(table, range(ROWS), beam_size=wide, length_penalty=alpha)
    for row in range(ROWS):
        found = {}
        for h in hypotheses(VOCAB, LENGTH):
            logp, n = log_probability(table, row, h)
            found[h] = logp / norm(n, alpha)
        best = max(found, key=found.get)
        assert tuple(tokens[row].tolist()) == best
        assert scores[row] == pytest.approx(found[best], rel=1e-5)


def test_the_length_penalty_matters():
    table = toy_table(eos=-1.0)
    lengths = []
    for alpha in (0.0, 3.0):
        tokens, _ = run_toy(table, range(ROWS), beam_size=81, length_penalty=alpha)
        lengths.append((tokens == EOS).argmax(-1))
    assert (lengths[0] <= lengths[1]).all()
    assert (lengths[0] < lengths[1]).any()


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_the_score_is_that_of_the_tokens(beams):
    for seed in range(10):
        table = toy_table(seed)
        options = {"beam_size": beams, "length_penalty": 0.6}
        tokens, scores = run_toy(table, range(ROWS), **options)
        for row in range(ROWS):
            logp, n = log_probability(table, row, tokens[row])
            assert scores[row] == pytest.approx(logp / norm(n, 0.6), rel=1e-5)


def search(table, row, beams, alpha):
    """Beam search without an early stop: 2 * beams candidates a step."""
    length, live, done = table.shape[1], [((), 0.0)], []
    for place in range(length):
        grown = []
        for tokens, logp in live:
            before, last = (0, 0, *tokens)[-2:]
            step = log_softmax(table[row, place, before, last])
            grown += [((*tokens, t), logp + x) for t, x in enumerate(step)]
        grown.sort(key=lambda h: -h[1])
        kept = grown[: 2 * beams]
        done += [(t, x / norm(place + 1, alpha)) for t, x in kept if t[-1] == EOS]
        done = sorted(done, key=lambda h: -h[1])[:beams]
        live = [h for h in kept if h[0][-1] != EOS][:beams]
    if done:
        return done[0]
    return live[0][0], live[0][1] / norm(length, alpha)


@pytest.mark.parametrize(("beams", "alpha"), [(1, 0.6), (2, 0.6), (3, 2.0)])
def test_stopping_early_changes_nothing(beams, alpha):
    options = {"beam_size": beams, "length_penalty": alpha}
    for seed in range(20):
        table = toy_table(seed, length=6, eos=[-2.0, 0.0, 2.0][seed % 3])
        tokens, scores = run_toy(table, range(ROWS), **options)
        for row in range(ROWS):
            best, score = search(table, row, beams, alpha)
            assert tuple(tokens[row].tolist()) == best + (PAD,) * (6 - len(best))
            # Float32 differences of logits of about 10.
            assert scores[row] == pytest.approx(score, rel=1e-5, abs=2e-6)


def test_one_beam_is_greedy_where_nothing_ends():
    # Of two candidates a step, EOS is never one: it is the least likely of four.
    for seed in range(10):
        table = toy_table(seed, eos=-50.0)
        beam, score = run_toy(table, range(ROWS), beam_size=1, length_penalty=0.0)
        greedy, logp = run_toy(table, range(ROWS), method="greedy")
        np.testing.assert_array_equal(beam, greedy)
        np.testing.assert_allclose(score, logp, rtol=1e-6)
        assert (greedy != EOS).all()


def test_greedy_takes_the_likeliest_each_time():
    for seed in range(10):
        table = toy_table(seed, eos=1.0)
        tokens, scores = run_toy(table, range(ROWS), method="greedy")
        for row in range(ROWS):
            before, last, expected = 0, 0, []
            while len(expected) < LENGTH and EOS not in expected:
                token = int(table[row, len(expected), before, last].argmax())
                before, last = last, token
                expected.append(token)
            logp, _ = log_probability(table, row, expected)
            expected += [PAD] * (LENGTH - len(expected))
            np.testing.assert_array_equal(tokens[row], expected)
            assert scores[row] == pytest.approx(logp, rel=1e-5)


METHODS = (
    {"method": "greedy"},
    {"method": "sample"},
    {"beam_size": 3},
)


@pytest.mark.parametrize("options", METHODS)
def test_after_the_end_there_is_padding(options):
    ends = set()
    for seed in range(10):
        tokens, _ = run_toy(toy_table(seed, eos=1.0), range(ROWS), **options)
        for row in tokens.tolist():
            if EOS in row:
                ends.add(row.index(EOS))
                assert not any(row[row.index(EOS) + 1 :])
    assert len(ends) > 1  # rows ended at different places


@pytest.mark.parametrize("options", [METHODS[0], METHODS[2]])
def test_a_row_does_not_depend_on_the_others(options):
    for seed in range(10):
        table = toy_table(seed, eos=0.5)
        together = run_toy(table, [0, 1, 2], **options)
        for row in range(ROWS):
            alone = run_toy(table, [row] * 3, **options)
            for a, b in zip(alone, together, strict=True):
                np.testing.assert_array_equal(a[row], b[row])


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
    tokens = jax.jit(decode.sampler(config))(jax.random.key(0), rows)
    seen = np.bincount(tokens, minlength=len(LOGP)) / draws
    p = expected_distribution(temperature, top_k, top_p)
    assert ((p == 0) == (seen == 0)).all()
    assert (np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_one_token_is_greedy(options):
    table = toy_table(eos=-1.0)
    greedy = run_toy(table, range(ROWS), method="greedy")
    sampled = run_toy(table, range(ROWS), method="sample", **options)
    np.testing.assert_array_equal(sampled[0], greedy[0])
    np.testing.assert_allclose(sampled[1], greedy[1], rtol=1e-6)


def test_top_k_above_the_vocabulary_is_off():
    rows = np.broadcast_to(LOGP, (100, len(LOGP)))
    draws = [
        decode.sampler(DecodeConfig(top_k=k))(jax.random.key(0), rows)
        for k in (0, len(LOGP), 1000)
    ]
    np.testing.assert_array_equal(draws[1], draws[0])
    np.testing.assert_array_equal(draws[2], draws[0])


# --- With a real model ---


@pytest.fixture(scope="module")
def translate(tiny_config, pair_batch):
    """(DecodeConfig fields) -> (tokens, scores), and a function that scores tokens."""
    model = models.build(tiny_config(vocab_size=VOCAB, num_layers=2))
    batch = pair_batch([5, 2, 4], [LENGTH] * 3, 5, vocab=VOCAB)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes
    )

    def run(**options):
        @jax.jit
        def go(variables):
            def extend(*args):
                return model.apply(variables, *args, method="extend")

            return decode.generate(
                DecodeConfig(**options),
                extend,
                *model.apply(variables, batch, LENGTH, method="start"),
                eos=EOS,
                length=LENGTH,
                rng=jax.random.key(0),
            )

        return [np.asarray(x) for x in go(variables)]

    apply = jax.jit(model.apply)

    def log_probabilities(row, inputs):
        """float64 [N, LENGTH, V] after each of inputs [N, LENGTH], by full passes."""
        part = {
            k: np.repeat(batch[k][row][None], len(inputs), 0)
            for k in ("encoder_inputs", "encoder_segments")
        }
        return log_softmax(apply(variables, part | {"inputs": inputs})["targets"])

    return run, log_probabilities


def test_greedy_is_argmax_of_full_passes(translate):
    run, log_probabilities = translate
    tokens, scores = run(method="greedy")
    for row in range(3):
        shifted, total = np.zeros((1, LENGTH + 1), np.int32), 0.0
        for place in range(LENGTH):
            logp = log_probabilities(row, shifted[:, :-1])[0, place]
            shifted[0, place + 1] = logp.argmax()
            total += logp.max()
            if logp.argmax() == EOS:
                break
        np.testing.assert_array_equal(tokens[row], shifted[0, 1:])
        assert scores[row] == pytest.approx(total, rel=1e-4)


def test_a_wide_beam_is_exhaustive_with_a_real_model(translate):
    run, log_probabilities = translate
    tokens, scores = run(beam_size=VOCAB**LENGTH, length_penalty=0.6)
    every = np.array(list(hypotheses(VOCAB, LENGTH)))
    inputs = np.pad(every, ((0, 0), (1, 0)))[:, :-1]
    counted = np.arange(LENGTH) <= (every == EOS).argmax(-1)[:, None]
    for row in range(3):
        logp = np.take_along_axis(log_probabilities(row, inputs), every[..., None], -1)[
            ..., 0
        ]
        found = (logp * counted).sum(-1) / norm(counted.sum(-1), 0.6)
        np.testing.assert_array_equal(tokens[row], every[found.argmax()])
        assert scores[row] == pytest.approx(found.max(), rel=1e-4)
