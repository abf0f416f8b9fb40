"""Mask.allowed means what its fields say."""

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from triform.models.mask import Mask

BATCH, QUERIES, KEYS = 2, 4, 5


def even_distance(i, j):
    return (i - j) % 2 == 0


def near_diagonal_blocks(i, j):
    return i // 2 == j // 2


def arrays(length, elements):
    row = st.lists(elements, min_size=length, max_size=length)
    return st.lists(row, min_size=BATCH, max_size=BATCH)


positions = st.integers(-2, 7)
segments = st.integers(0, 2)
slices = st.sampled_from([slice(None), slice(1, 3), slice(2, None)])


@st.composite
def masks(draw):
    """The fields of a mask, as lists and values."""
    both = draw(st.booleans())
    return {
        "q_positions": draw(arrays(QUERIES, positions)),
        "kv_positions": draw(arrays(KEYS, positions)),
        "q_segments": draw(arrays(QUERIES, segments)) if both else None,
        "kv_segments": draw(arrays(KEYS, segments)) if both else None,
        "q_global": draw(st.none() | arrays(QUERIES, st.booleans())),
        "kv_global": draw(st.none() | arrays(KEYS, st.booleans())),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 1, 2, 4])),
        "dilation": draw(st.sampled_from([1, 2, 3])),
        "pattern": draw(st.sampled_from([None, even_distance, near_diagonal_blocks])),
    }


def sees(fields, b, query, key):
    """The documentation of Mask's fields, sentence by sentence."""
    i = fields["q_positions"][b][query]
    j = fields["kv_positions"][b][key]
    if i < 0 or j < 0:  # negative: empty slot
        return False
    if fields["q_segments"] is not None:
        mine, its = fields["q_segments"][b][query], fields["kv_segments"][b][key]
        if mine != its or its == 0:  # another segment; 0: padding
            return False
    if fields["causal"] and j > i:
        return False
    if fields["q_global"] is not None and fields["q_global"][b][query]:
        return True  # sees past window and pattern
    if fields["kv_global"] is not None and fields["kv_global"][b][key]:
        return True  # is seen past window and pattern
    if fields["window"]:
        steps, between = divmod(abs(i - j), fields["dilation"])
        if between or not steps < fields["window"]:
            return False
    return fields["pattern"] is None or fields["pattern"](i, j)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(masks(), slices, slices)
def test_allowed_is_the_documentation(fields, q_slice, kv_slice):
    mask = Mask(
        **{k: jnp.array(v) if isinstance(v, list) else v for k, v in fields.items()}
    )
    expected = np.array(
        [
            [[sees(fields, b, q, k) for k in range(KEYS)] for q in range(QUERIES)]
            for b in range(BATCH)
        ]
    )
    got = mask.allowed(q_slice, kv_slice)
    assert got.dtype == bool
    np.testing.assert_array_equal(got, expected[:, q_slice, kv_slice])


def test_the_strategy_and_the_loop_know_every_field():
    names = {field.name for field in dataclasses.fields(Mask)}
    assert names - {"aligned"} == {  # which changes nothing: kernels may ask for it
        *("q_positions", "kv_positions", "q_segments", "kv_segments"),
        *("q_global", "kv_global", "causal", "window", "dilation", "pattern"),
    }


@pytest.mark.parametrize("window", [0, 3])
def test_array_order_never_matters(window):
    rng = np.random.default_rng(0)
    positions, order = jnp.arange(6)[None], rng.permutation(6)
    mask = Mask.self_attention(positions, jnp.ones((1, 6), int), causal=True)
    mask = mask.replace(window=window)
    shuffled = mask.replace(
        kv_positions=positions[:, order], kv_segments=mask.kv_segments[:, order]
    )
    np.testing.assert_array_equal(shuffled.allowed(), mask.allowed()[..., order])


def test_self_attention_uses_one_side_twice():
    positions, segments = jnp.arange(3)[None], jnp.array([[1, 1, 0]])
    mask = Mask.self_attention(positions, segments, causal=True, window=2)
    np.testing.assert_array_equal(mask.allowed()[0], [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
