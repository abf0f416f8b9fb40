"""Norms by layer: equal to sums by hand, looped and scanned, and harmless."""

import copy

import jax
import numpy as np
import pytest
from laws import update
from test_forecast import LENGTH, ROWS, VOCAB, config

from triform.experiment import Experiment
from triform.models.stacking import stacked_layers
from triform.runtime import norms


def test_layers_have_the_same_norms_looped_and_scanned():
    params = jax.eval_shape(Experiment(config(num_layers=4)).init_variables)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), params)
    looped = norms.grouped(params)
    by_hand = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params["decoder"]["layer_2"]):
        kind = "norms" if "norm" in str(path) else path[0].key
        by_hand[kind] = by_hand.get(kind, 0) + float((x.astype(float) ** 2).sum())
    wanted = {k: x**0.5 for k, x in by_hand.items()}
    assert looped["decoder/layer_2/attention"] == pytest.approx(
        wanted["self_attention"], rel=1e-5
    )
    assert looped["decoder/layer_2/feed-forward"] == pytest.approx(
        wanted["feed_forward"], rel=1e-5
    )
    assert {"embedding", "norms", "decoder/layer_2/norms"} < set(looped) | {"norms"}
    for cycle in (1, 2):
        scanned = norms.grouped(stacked_layers(params, cycle))
        assert scanned.keys() == looped.keys()
        for name, norm in looped.items():
            np.testing.assert_allclose(scanned[name], norm, rtol=1e-6, err_msg=name)


def test_a_run_that_logs_norms_is_the_same_bit_for_bit():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    batch = {
        "inputs": tokens,
        "targets": tokens,
        "weights": np.ones((ROWS, LENGTH), np.float32),
    }
    ours = config(num_layers=1)
    ours.optim.warmup_steps = 1
    start = jax.tree.map(
        np.asarray, jax.jit(Experiment(ours).make_state)().replace(rng=None)
    )
    plain, measured = update(Experiment(ours), start, batch)
    ours = copy.deepcopy(ours)
    ours.log_norms = True
    logged, found = update(Experiment(ours), start, batch)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(logged), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {k: found[k] for k in measured} == measured
    gradients = [x for k, x in found.items() if k.startswith("train/grad_norm/")]
    assert np.sqrt(np.square(gradients).sum()) == pytest.approx(
        measured["train/grad_norm"], rel=1e-5
    )
    change = np.sqrt(
        sum(
            np.square(a - b).sum()
            for a, b in zip(
                jax.tree.leaves(plain.params),
                jax.tree.leaves(start.params),
                strict=True,
            )
        )
    )
    updates = [x for k, x in found.items() if k.startswith("train/update_norm/")]
    assert np.sqrt(np.square(updates).sum()) == pytest.approx(change, rel=1e-3)
