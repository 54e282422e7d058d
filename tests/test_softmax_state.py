"""The algebra of partial states against float64."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_attention._core import tools

EMPTY = (-math.inf, 0.0)
scores = st.lists(
    st.one_of(st.floats(-300, 300, width=32), st.floats(-(2.0**99), 2.0**99, width=32), st.just(-math.inf)),
    max_size=20,
)


def state_of(values: list[float]) -> tuple[float, float]:
    """(m, l) of scores in units of log2, in float64."""
    m = max(values, default=-math.inf)
    if m == -math.inf:
        return EMPTY
    return m, float(np.exp2(np.array(values) - m).sum())


def merged(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return tools.merge(*a, *b)[:2]


def assert_same_state(a: tuple[float, float], b: tuple[float, float]) -> None:
    assert a[0] == b[0]
    assert math.isclose(a[1], b[1], rel_tol=2e-6)


@settings(max_examples=500, deadline=None)
@given(scores, scores, scores)
def test_merging_is_associative_and_right(x: list[float], y: list[float], z: list[float]) -> None:
    a, b, c = state_of(x), state_of(y), state_of(z)
    left, right = merged(merged(a, b), c), merged(a, merged(b, c))
    assert_same_state(left, right)
    assert_same_state(left, state_of(x + y + z))


@settings(max_examples=200, deadline=None)
@given(scores)
def test_the_empty_state_is_the_identity(x: list[float]) -> None:
    state = tuple(float(np.float32(value)) for value in state_of(x))
    for result in (tools.merge(*state, *EMPTY), tools.merge(*EMPTY, *state)):
        assert result[:2] == state
    assert tools.merge(*EMPTY, *EMPTY) == (-math.inf, 0.0, 0.0, 0.0)
    assert tools.log_sum_exp(*EMPTY) == -math.inf


@settings(max_examples=200, deadline=None)
@given(st.floats(-(2.0**99), 2.0**99, width=32), st.floats(-(2.0**99), 2.0**99, width=32))
def test_weights_bring_outputs_to_the_merged_maximum(m_a: float, m_b: float) -> None:
    m, _, weight_a, weight_b = tools.merge(m_a, 1.0, m_b, 1.0)
    assert m == max(m_a, m_b)
    assert max(weight_a, weight_b) == 1.0
    assert math.isclose(
        min(weight_a, weight_b), 2.0 ** max(-abs(m_a - m_b), -1000), rel_tol=1e-6, abs_tol=1e-37
    )


def test_nan_is_not_lost_in_an_empty_looking_state() -> None:
    """All scores of a piece NaN: m stays -inf, but l carries the NaN."""
    for result in (
        tools.merge(-math.inf, math.nan, 1.0, 2.0),
        tools.merge(1.0, 2.0, -math.inf, math.nan),
    ):
        assert math.isnan(result[1])
