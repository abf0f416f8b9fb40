"""What a text may not say again: as transformers has it, by every method."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_decoder import NoCache

from triform.models import decode, repeats
from triform.models.decode import DecodeConfig

VOCAB, NEW = 7, 9
RULES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 3},
    {"repetition_penalty": 1.3, "no_repeat_ngram": 2},
]


def theirs(rules, logits, history):
    """Logits [V] after transformers' processors; -inf is NEVER."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.tensor(np.array([history]), dtype=torch.int64)
    found = torch.tensor(np.array([logits]))
    if penalty := rules.get("repetition_penalty"):
        found = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, found)
    if n := rules.get("no_repeat_ngram"):
        found = process.NoRepeatNGramLogitsProcessor(n)(ids, found)
    return np.maximum(found.numpy()[0], repeats.NEVER)


@pytest.mark.parametrize("rules", RULES)
def test_what_is_punished_is_what_transformers_punishes(rules):
    """Of prompts of any length, and whatever stands behind what is written."""
    rng, config = np.random.default_rng(0), DecodeConfig(**rules)
    lengths = np.array([1, 2, 5, 8])
    before = rng.integers(0, 3, (4, 8), np.int32)
    before[np.arange(8) < 8 - lengths[:, None]] = repeats.NONE
    new = rng.integers(0, 3, (4, NEW), np.int32)
    logits = rng.standard_normal((4, VOCAB)).astype(np.float32)
    for at in (0, 1, 4, NEW):
        found = repeats.restrained(config, logits, before, new, at)
        for row, n in enumerate(lengths):
            history = [*before[row, 8 - n :], *new[row, :at]]
            expected = theirs(rules, logits[row], history)
            np.testing.assert_allclose(found[row], expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_no_method_writes_a_run_of_tokens_twice(method):
    """Whatever the logits; greedy search takes the best that is left."""
    logits = np.linspace(2, -1, VOCAB, dtype=np.float32)
    rules = {"repetition_penalty": 1.2, "no_repeat_ngram": 2}

    def extend(tokens, positions, cache):
        return jnp.broadcast_to(logits, (*tokens.shape, VOCAB)), cache

    read = np.array([[repeats.NONE, 3, 0], [0, 0, 1]], np.int32)
    first = read[:, -1]
    config = DecodeConfig(method=method, beam_size=2, **rules)
    options = {"eos": -1, "length": NEW, "rng": jax.random.key(0), "read": read}
    tokens, _, logp = decode.generate(
        config, extend, NoCache(), first, first, **options
    )
    for row, written in enumerate(np.asarray(tokens)):
        history = [x for x in read[row].tolist() if x != repeats.NONE]
        given = len(history)
        for token in written.tolist():
            if method == "greedy":
                assert token == theirs(rules, logits, history).argmax()
            history.append(token)
        pairs = [*itertools.pairwise(history)]
        assert len({*pairs[given - 1 :]}) == NEW
        assert not {*pairs[: given - 1]} & {*pairs[given - 1 :]}
        # Told are the model's own.
        expected = jax.nn.log_softmax(logits)[written]
        np.testing.assert_allclose(logp[row], expected, atol=1e-5)
