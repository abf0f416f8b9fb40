"""Logits in parts: the numbers of all at once, never all of them in one array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, batch_of, with_trunk
from laws import assert_trees_close, init, value_and_grad

from triform import models, tasks
from triform.models.logits import Logits
from triform.tasks.base import Context

B, L, D, V = 2, 7, 8, 1000
PARTS = {"label_smoothing": 0.1, "z_loss": 1e-3}


def token_task(config):
    return tasks.build(tasks.TokenPredictionConfig(**PARTS), models.build(config))


def step_of(task, batch):
    """Function: params -> ((loss, accuracy, perplexity), gradients)."""

    def objective(params):
        ctx = Context(0, {}, True)
        outputs, _ = task.outputs({"params": params}, batch, ctx)
        found = {k: m.total for k, m in task.metrics(outputs, batch, ctx).items()}
        return task.terms(outputs, batch, ctx)["token"], found

    return jax.value_and_grad(objective, has_aux=True)


def whole_arrays(jaxpr, size):
    """How often a primitive makes so many numbers, in a jaxpr and all that it calls."""
    found = 0
    for eqn in jaxpr.eqns:
        found += sum(getattr(v.aval, "size", 0) >= size for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += whole_arrays(inner, size)
    return found


def products(jaxpr, width):
    """How many products have an output of this last size."""
    text = str(jaxpr)
    return sum("dot_general" in x and f",{width}]" in x for x in text.splitlines())


@pytest.mark.parametrize("name", ["gpt2", "t5 v1.1", "marian", "bert"])
def test_a_step_in_parts_is_the_step(name):
    config = FAMILIES[name]
    if name == "bert":
        config = dataclasses.replace(config, num_labels=0)
    batch = batch_of(config)
    rows = batch["inputs"].shape
    targets = np.random.default_rng(1).integers(0, config.vocab_size, rows)
    batch |= {"targets": targets, "weights": np.ones(rows, np.float32)}
    params = init(config, batch)
    whole = jax.jit(step_of(token_task(config), batch))(params)
    parts = token_task(with_trunk(config, logit_chunks=3))
    assert_trees_close(jax.jit(step_of(parts, batch))(params), whole)


def test_no_array_of_all_logits_and_one_pass_for_loss_and_metrics():
    x, kernel = jnp.ones((B, L, D)), jnp.ones((D, V))
    targets = jnp.ones((B, L), jnp.int32)
    config = tasks.TokenPredictionConfig(**PARTS)
    task = tasks.build(config, None)

    def objective(x, kernel, chunks):
        batch = {"targets": targets, "weights": jnp.ones((B, L))}
        outputs, ctx = (
            {"targets": Logits(x, kernel, None, chunks)},
            Context(0, {}, True),
        )
        return task.terms(outputs, batch, ctx)["token"], task.metrics(
            outputs, batch, ctx
        )

    gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
    for chunks, expected in ((L, 0), (1, 1)):
        made = jax.make_jaxpr(gradient, static_argnums=2)(x, kernel, chunks)
        assert bool(whole_arrays(made.jaxpr, B * L * V)) == expected
        # Forward, and once more in the backward pass.
        assert products(made, V) == 2


def test_gradients_of_parts_add_up_in_float32():
    """512 equal parts in bfloat16: their sum would stop growing at 256."""
    count = 512
    x = jnp.ones((1, count, 1), jnp.bfloat16)
    kernel = jnp.ones((1, 4), jnp.float32)

    def total(kernel):
        return Logits(x, kernel, None, count).map(lambda part: part[..., 0]).sum()

    np.testing.assert_array_equal(jax.grad(total)(kernel)[0], [count, 0, 0, 0])


def test_a_length_that_parts_do_not_divide_and_a_tree_of_results():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(B, L, D)), rng.normal(size=(D, 5))
    logits = Logits(jnp.float32(x), jnp.float32(kernel), jnp.arange(5.0), 3)
    assert logits.shape == (B, L, 5)
    ids = jnp.arange(B * L).reshape(B, L) % 5
    made = logits.map(lambda part, i: {"best": part.max(-1), "same": i}, ids)
    expected = x @ kernel + np.arange(5)
    np.testing.assert_allclose(made["best"], expected.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(made["same"], ids)
    np.testing.assert_allclose(logits.array(), expected, rtol=1e-5, atol=1e-6)


def test_an_adapted_head_in_parts_is_the_head():
    config = FAMILIES["lora"]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, tie_head=False),
        targets=("^head/kernel$",),
        dropout=0.0,
    )
    batch = batch_of(config)
    params = init(config, batch)
    assert "lora_b" in params["head"]
    expected, grads = value_and_grad(config, params, batch)
    parts = with_trunk(config, logit_chunks=3)
    found, found_grads = value_and_grad(parts, params, batch)
    assert_trees_close(found, expected)
    assert_trees_close(found_grads, grads)
