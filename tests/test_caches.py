"""Law 3 where rows are longer than blocks and windows: rings, and blocks of queries."""

import jax
import numpy as np
import pytest
from families import LLAMA, lm, with_trunk
from laws import assert_prompts_are_continued, init

from triform import models
from triform.models.cache import Cache

LENGTH, PROMPT = 32, 24
SHAPE = {**LLAMA, "max_len": LENGTH, "attention_options": ("block", 8)}
LOCAL = {**LLAMA, "max_len": LENGTH, "attention": "local"}
DILATED = ("dilation", 2, "dilated_heads", 1)
CONFIGS = {
    "flash": lm(**SHAPE, attention="flash"),
    "flash, window": lm(**SHAPE, attention="flash", windows=(5,), scan_layers=True),
    "dot, windows": lm(**{**LLAMA, "max_len": LENGTH}, windows=(5, 0)),
    "local": lm(**LOCAL, windows=(5,)),
    "local, scanned": lm(**LOCAL, windows=(3, 9), scan_layers=True, num_kv_heads=1),
    "local, dilated": lm(**LOCAL, windows=(4,), attention_options=DILATED),
}


def long_batch(rows=3):
    rng = np.random.default_rng(0)
    return {"inputs": rng.integers(3, 11, (rows, LENGTH)).astype(np.int32)}


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_pass(name):
    """Prompts padded on either side and within; then one token and three at a time."""
    order = np.full((3, PROMPT), -1)
    order[0, :20] = np.arange(20)
    order[1, PROMPT - 3 :] = np.arange(3)
    order[2, ::2] = np.arange(PROMPT // 2)
    close = {"rtol": 2e-5, "atol": 1e-5}
    batch = long_batch()
    assert_prompts_are_continued(CONFIGS[name], batch, order, (1, 3, 3), close)


@pytest.mark.parametrize("name", ["local", "local, scanned", "local, dilated"])
def test_a_ring_does_not_grow(name):
    trunk = CONFIGS[name].trunk

    def size(length):
        blocks = Cache.empty(trunk, 2, length).blocks
        return sum(x.size for x in jax.tree.leaves(blocks))

    assert size(100) == size(1000)
    reach = max(trunk.reach(w) for w in trunk.windows)
    assert size(reach) == size(reach + 1) > size(reach - 1)


@pytest.mark.parametrize("name", ["flash", "local"])
def test_packed_equals_separate(packed, name):
    config, lengths = CONFIGS[name], (9, 13, 20)
    batch = long_batch()
    apply = jax.jit(models.build(config).apply)
    variables = {"params": init(config, batch)}
    separate = apply(variables, batch)["targets"]
    logits = apply(variables, packed(batch, lengths))["targets"][0]
    expected = np.concatenate([separate[r, :n] for r, n in enumerate(lengths)])
    np.testing.assert_allclose(logits[:-1], expected, rtol=2e-5, atol=1e-5)


def test_algorithms_of_exact_attention_are_one_model():
    config = lm(**{**LLAMA, "max_len": LENGTH}, windows=(5, 0))
    batch = long_batch()
    variables = {"params": init(config, batch)}
    expected = jax.jit(models.build(config).apply)(variables, batch)["targets"]
    for fields in ({"attention": "flash"}, {"attention": "local", "windows": (5, 64)}):
        other = with_trunk(config, **fields)
        found = jax.jit(models.build(other).apply)(variables, batch)["targets"]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
