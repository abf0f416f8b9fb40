"""Random features: their rows, their kernel and what they make of attention."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform.models.algorithms.dot import dot
from triform.models.algorithms.features import EPSILON, log_features, projection
from triform.models.algorithms.performer import performer
from triform.models.mask import Mask

FEATURES, WIDTH = 6, 4  # a block and a half


@functools.cache
def draws(orthogonal):
    """Rows of many keys and of many seeds, each [draws, FEATURES, WIDTH]."""
    draw = functools.partial(projection, FEATURES, WIDTH, orthogonal=orthogonal)
    keys = jax.random.split(jax.random.key(0), 40_000)
    of_keys = jax.jit(jax.vmap(lambda key: draw(rng=key)))(keys)
    return np.asarray(of_keys), np.stack([draw(seed=i) for i in range(4000)])


@pytest.mark.parametrize("orthogonal", [True, False])
def test_rows_are_standard_normal_and_at_right_angles(orthogonal):
    for rows in draws(orthogonal):
        products = rows @ rows.swapaxes(1, 2)
        apart = np.abs(products[:, :WIDTH, :WIDTH] * (1 - np.eye(WIDTH))).max()
        assert (apart < 1e-5) == orthogonal
        # Each number: mean 0, variance 1; its square: mean 1, variance 2; the squared
        # norm of a row: mean 4, variance 8. 24 of each: 4.5 standard errors.
        error = 4.5 / len(rows) ** 0.5
        assert np.abs(rows.mean(0)).max() < error
        assert np.abs((rows**2).mean(0) - 1).max() < error * 2**0.5
        lengths = (rows**2).sum(-1)
        assert np.abs(lengths.mean(0) - WIDTH).max() < error * 8**0.5
        # Lengths differ as those of independent rows (fourth moment of chi squared).
        assert np.abs(lengths.var(0) - 8).max() < error * 320**0.5


def test_the_rows_of_a_seed_never_change():
    """Weights that were trained with them would be worthless."""
    expected = [[1.7982874, -0.1953683], [0.2641074, 2.4310033], [0.3919902, 2.0710356]]
    np.testing.assert_allclose(projection(3, 2), expected, atol=1e-6)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_softmax_kernel_is_unbiased(orthogonal):
    """The mean of phi(q) phi(k) over draws is exp(q k), within 4 standard errors."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 12, WIDTH)).astype(np.float32)
    # The variance grows as exp(|q + k|^2): longer ones would need more draws.
    q, k = (0.7 * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))

    @jax.jit
    @jax.vmap
    def estimate(w):
        return jnp.exp(log_features(q, w) + log_features(k, w)).sum(-1)

    for rows in draws(orthogonal):
        samples, expected = np.asarray(estimate(rows)), np.exp((q * k).sum(-1))
        error = samples.std(0) / len(samples) ** 0.5
        assert (error < 0.03 * expected).all()
        assert (np.abs(samples.mean(0) - expected) < 4 * error).all()


def test_features_are_the_equations():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 5, WIDTH)), projection(FEATURES, WIDTH)
    along = x @ np.float64(w).T
    expected = {
        "softmax": np.exp(along - (x**2).sum(-1, keepdims=True) / 2),
        "relu": np.maximum(along, 0) + EPSILON,
    }
    for kernel, phi in expected.items():
        found = np.exp(log_features(jnp.asarray(x, jnp.float32), w, kernel))
        np.testing.assert_allclose(found, phi / FEATURES**0.5, 1e-5, 1e-6)


def test_the_error_falls_with_the_square_root_of_features():
    """And orthogonal features err less than independent ones (Theorem 2)."""
    counts, width, scale = (16, 128, 1024), 8, 8**-0.5
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 24, 2, width)).astype(np.float32)
    # The square of a weight's error is (exp(|q + k|^2) - 1) / M, to first order: of
    # longer ones the error is all there is until M is large.
    q, k = q / 4, k / 4
    mask = Mask.self_attention(jnp.arange(24)[None])
    exact = dot(q, k, v, mask, scale=scale)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def error(keys, features, orthogonal):
        def square(key):
            options = {"features": features, "orthogonal": orthogonal}
            out = performer(q, k, v, mask, scale=scale, rng=key, **options)
            return jnp.square(out - exact).mean()

        return jnp.sqrt(jax.lax.map(square, keys).mean())

    keys = jax.random.split(jax.random.key(0), 64)
    errors = {
        kind: np.array([error(keys, m, kind) for m in counts]) for kind in (True, False)
    }
    for found in errors.values():
        slope = np.polyfit(np.log(counts), np.log(found), 1)[0]
        assert abs(slope + 0.5) < 0.05
    assert (errors[True] < errors[False]).all()


def test_blocks_are_orthogonalised_one_by_one():
    """A batch of them, in two layers at once, deadlocks jaxlib's threads on CPUs."""
    lowered = jax.jit(lambda key: projection(8, 4, rng=key)).lower(jax.random.key(0))
    batches = re.findall(r'@lapack.*num_batch_dims = "(\d+)"', lowered.as_text())
    assert batches == ["0", "0"]
