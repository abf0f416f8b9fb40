"""Relative attention with keys of distances (Shaw et al. 2018; Huang et al. 2018)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import trunk

from triform.models.mask import Mask
from triform.models.positions import RelativeKeys, skewed

B, L, H, E = 2, 6, 2, 4


def dense(query, table, q_positions, kv_positions, farthest, scale):
    """The definition, one pair after another: q . r of the distance, clipped."""
    q, r = np.asarray(query, np.float64), np.asarray(table, np.float64)
    out = np.zeros((len(q), q.shape[2], q.shape[1], kv_positions.shape[1]))
    for b, h, i, j in np.ndindex(out.shape):
        distance = int(kv_positions[b, j]) - int(q_positions[b, i])
        which = np.clip(distance + farthest, 0, len(r) - 1)
        out[b, h, i, j] = scale * q[b, i, h] @ r[which, h]
    return out


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("max_len", [4, 9])
def test_scores_are_those_of_the_definition(causal, aligned, max_len):
    config = trunk(d_model=H * E, num_heads=H, max_len=max_len)
    rng = np.random.default_rng(0)
    query = rng.standard_normal((B, L, H, E)).astype(np.float32)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    if not aligned:  # padded, packed, in another order
        positions = np.array([[-1, -1, 0, 1, 2, 3], [2, 0, 1, 0, 5, 4]], np.int32)
    mask = Mask.self_attention(positions, causal=causal, aligned=aligned)
    module = RelativeKeys(config)
    variables = module.init(jax.random.key(0), query, mask)
    table = variables["params"]["embedding"]
    assert table.shape == (max_len if causal else 2 * max_len - 1, H, E)
    got = jax.jit(module.apply)(variables, query, mask)
    expected = dense(query, table, positions, positions, max_len - 1, E**-0.5)
    seen = np.broadcast_to(np.asarray(mask.allowed())[:, None], got.shape)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[seen], expected[seen], rtol=1e-5, atol=1e-6)


def test_rows_are_skewed_without_a_gather():
    distances = np.arange(L)[:, None] * 100 + np.arange(1 - L, L)
    got = np.asarray(skewed(jnp.asarray(distances), causal=False))
    i, j = np.mgrid[:L, :L]
    np.testing.assert_array_equal(got, i * 100 + j - i)
    past = np.asarray(skewed(jnp.asarray(distances[:, :L]), causal=True))
    np.testing.assert_array_equal(past[j <= i], got[j <= i])
    text = jax.jit(lambda x: skewed(x, True)).lower(jnp.zeros((1, 1, L, L))).as_text()
    assert "gather" not in text
