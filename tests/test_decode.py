"""Decoding: greedy, beam search and sampling against what they claim to compute."""

import itertools

import jax
import numpy as np
import pytest
from toy_decoder import EOS, LENGTH, PAD, ROWS, VOCAB, run_all, run_toy, toy_table

from triform import models
from triform.models import LanguageModelConfig, decode
from triform.models.decode import DecodeConfig


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


@pytest.mark.parametrize("beams", [2, 5])
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


@pytest.mark.parametrize(("beams", "alpha"), [(2, 0.0), (2, 0.6), (3, 2.0)])
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


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_one_beam_is_greedy(alpha):
    """Whatever ends where, and whatever the length penalty."""
    for seed in range(10):
        table = toy_table(seed, eos=[-50.0, 0.0, 2.0][seed % 3])
        beam = run_all(table, range(ROWS), beam_size=1, length_penalty=alpha)
        greedy = run_all(table, range(ROWS), method="greedy")
        for a, b in zip(beam, greedy, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "options",
    [{"method": "greedy"}, {"method": "sample"}, {"beam_size": 3}, {"beam_size": 1}],
)
def test_every_token_has_its_log_probability(options):
    """Their sum is the text's; after the end there is nothing."""
    options = {"length_penalty": 0.0, **options}
    for seed in range(6):
        table = toy_table(seed, eos=1.0)
        tokens, scores, logp = map(np.asarray, run_all(table, range(ROWS), **options))
        np.testing.assert_allclose(logp.sum(-1), scores, rtol=1e-5, atol=1e-6)
        for row in range(ROWS):
            before, last, over = 0, 0, False
            for place, token in enumerate(tokens[row]):
                step = log_softmax(table[row, place, before, last])[token]
                expected = 0.0 if over else step
                assert logp[row, place] == pytest.approx(expected, abs=2e-6)
                before, last, over = last, token, over or token == EOS


@pytest.mark.parametrize("options", [{"method": "greedy"}, {"beam_size": 3}])
def test_any_of_several_ends_ends_a_text(options):
    """As one end does in a table where they are one token: probabilities add."""
    both, ended = (EOS, 2), set()
    for seed in range(10):
        table = toy_table(seed, eos=-1.0)
        tokens = np.asarray(run_toy(table, range(ROWS), eos=both, **options)[0])
        for row in tokens.tolist():
            stops = [i for i, token in enumerate(row) if token in both]
            assert not any(row[stops[0] + 1 :]) if stops else True
            ended |= {row[i] for i in stops}
    assert ended == {*both}


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


# --- With a real model ---


PROMPTS = ([3, 2], [2], [2, 3, 3, 0])  # token 0 is one like any other


def prompts() -> dict[str, np.ndarray]:
    """Padded on the right, on the left, and not."""
    inputs = np.full((ROWS, 4), 3, np.int32)
    segments = np.zeros_like(inputs)
    for row, (prompt, at) in enumerate(zip(PROMPTS, (0, 3, 0), strict=True)):
        inputs[row, at : at + len(prompt)] = prompt
        segments[row, at : at + len(prompt)] = 1
    return {"inputs": inputs, "segments": segments}


@pytest.fixture(scope="module", params=["encoder-decoder", "language model"])
def writer(request, tiny_config, pair_batch):
    """(model, variables, batch to start from, log-probabilities by full passes)."""
    if request.param == "encoder-decoder":
        model = models.build(tiny_config(vocab_size=VOCAB, num_layers=2))
        batch = pair_batch([5, 2, 4], [LENGTH] * 3, 5, vocab=VOCAB)
    else:
        fields = {"positions": "rotary", "norm": "rms", "norm_position": "pre"}
        fields |= {"scan_layers": True, "num_layers": 2, "num_kv_heads": 1}
        trunk = tiny_config(**fields).trunk
        model, batch = models.build(LanguageModelConfig(trunk, VOCAB)), prompts()
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes
    )
    apply = jax.jit(model.apply)

    def log_probabilities(row, inputs):
        """float64 [N, LENGTH, V] after each of inputs [N, LENGTH], by full passes.

        Instead of the first of inputs stands what the text starts with.
        """
        if request.param == "encoder-decoder":
            part = {
                k: np.repeat(batch[k][row][None], len(inputs), 0)
                for k in ("encoder_inputs", "encoder_segments")
            }
            return log_softmax(apply(variables, part | {"inputs": inputs})["targets"])
        prompt = PROMPTS[row]
        whole = np.zeros((len(inputs), LENGTH + 3), np.int32)
        whole[:, : len(prompt)] = prompt
        whole[:, len(prompt) :][:, : LENGTH - 1] = inputs[:, 1:]
        logits = apply(variables, {"inputs": whole})["targets"]
        return log_softmax(logits[:, len(prompt) - 1 :][:, :LENGTH])

    return model, variables, batch, log_probabilities


def write(writer, **options):
    """[tokens, scores, log-probabilities of the tokens] of a model."""
    model, variables, batch, _ = writer

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


def test_greedy_is_argmax_of_full_passes(writer):
    tokens, scores, _ = write(writer, method="greedy")
    for row in range(ROWS):
        shifted, total = np.zeros((1, LENGTH + 1), np.int32), 0.0
        for place in range(LENGTH):
            logp = writer[-1](row, shifted[:, :-1])[0, place]
            shifted[0, place + 1] = logp.argmax()
            total += logp.max()
            if logp.argmax() == EOS:
                break
        np.testing.assert_array_equal(tokens[row], shifted[0, 1:])
        assert scores[row] == pytest.approx(total, rel=1e-4)


def test_a_wide_beam_is_exhaustive_with_a_real_model(writer):
    tokens, scores, _ = write(writer, beam_size=VOCAB**LENGTH, length_penalty=0.6)
    every = np.array(list(hypotheses(VOCAB, LENGTH)))
    inputs = np.pad(every, ((0, 0), (1, 0)))[:, :-1]
    counted = np.arange(LENGTH) <= (every == EOS).argmax(-1)[:, None]
    for row in range(ROWS):
        logp = np.take_along_axis(writer[-1](row, inputs), every[..., None], -1)[..., 0]
        found = (logp * counted).sum(-1) / norm(counted.sum(-1), 0.6)
        np.testing.assert_array_equal(tokens[row], every[found.argmax()])
        assert scores[row] == pytest.approx(found.max(), rel=1e-4)


@pytest.mark.parametrize(("beams", "vocab"), [(1, 5), (3, 1000), (2, 1024)])
def test_the_best_entries_are_those_of_top_k(beams, vocab):
    """In blocks or not, the order of equal entries too: there are many here."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, beams, vocab)).round(1).astype(np.float32)
    x[10:, 1:] += decode.NEVER
    x[15:] *= 1e-9  # all are equal, or nearly
    for count in (1, 4):
        found = jax.jit(decode.best, static_argnums=1)(x, count)
        wanted = jax.lax.top_k(x.reshape(20, -1), count)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


# --- In pieces ---


@pytest.mark.parametrize("options", [METHODS[0], {"method": "sample", "top_k": 3}])
def test_pieces_are_the_text_in_one_go(writer, options):
    """Bit for bit: what streams is what a single call gives."""
    model, variables, batch, _ = writer
    config, rng = DecodeConfig(**options), jax.random.key(0)
    whole = write(writer, **options)

    @jax.jit
    def begin(variables):
        start = model.apply(variables, batch, LENGTH, method="start")
        return decode.begin(*start, LENGTH, rng)

    @jax.jit
    def advance(variables, text, until):
        def extend(*args):
            return model.apply(variables, *args, method="extend")

        return decode.advance(config, extend, text, EOS, until)

    for pieces in ((1, 2, 2, 3, LENGTH), (3, LENGTH), (LENGTH,)):
        text = begin(variables)
        for until in pieces:
            text = advance(variables, text, until)
            count = int(text.count)
            assert count == until or text.done.all()
            np.testing.assert_array_equal(text.tokens[:, :count], whole[0][:, :count])
            assert not text.tokens[:, count:].any()
        np.testing.assert_array_equal(text.tokens, whole[0])
        np.testing.assert_array_equal(text.logp, whole[2])
