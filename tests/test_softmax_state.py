"""The algebra of partial states against float64, and `merge_states` on tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lean_attention
from lean_attention import reference
from lean_attention._core import core
from tests.cases import Case, make_inputs
from tests.emulation import load

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
    return core.merge(a, b)[:2]


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
    for result in (core.merge(state, EMPTY), core.merge(EMPTY, state)):
        assert result[:2] == state
    assert core.merge(EMPTY, EMPTY) == (-math.inf, 0.0, 0.0, 0.0)
    assert core.log_sum_exp(*EMPTY) == -math.inf


@settings(max_examples=200, deadline=None)
@given(st.floats(-(2.0**99), 2.0**99, width=32), st.floats(-(2.0**99), 2.0**99, width=32))
def test_weights_bring_outputs_to_the_merged_maximum(m_a: float, m_b: float) -> None:
    m, _, weight_a, weight_b = core.merge((m_a, 1.0), (m_b, 1.0))
    assert m == max(m_a, m_b)
    assert max(weight_a, weight_b) == 1.0
    assert math.isclose(
        min(weight_a, weight_b), 2.0 ** max(-abs(m_a - m_b), -1000), rel_tol=1e-6, abs_tol=1e-37
    )


def test_nan_is_not_lost_in_an_empty_looking_state() -> None:
    """All scores of a piece NaN: m stays -inf, but l carries the NaN."""
    for result in (
        core.merge((-math.inf, math.nan), (1.0, 2.0)),
        core.merge((1.0, 2.0), (-math.inf, math.nan)),
    ):
        assert math.isnan(result[1])


def merge_emulated(outs: list, lses: list, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    load().configure(seed=torch.randint(2**31, ()).item())
    return torch.ops.lean_attn_emulated.merge_states(outs, lses, base=base)


def merge_on_gpu(outs: list, lses: list, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    outs, lses = ([t.cuda() for t in tensors] for tensors in (outs, lses))
    return tuple(t.cpu() for t in lean_attention.merge_states(outs, lses, base=base))


on_every_backend = pytest.mark.parametrize(
    "merge",
    [lean_attention.merge_states, merge_emulated, pytest.param(merge_on_gpu, marks=pytest.mark.gpu)],
    ids=["cpu", "emulated", "gpu"],
)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", [1, 2, 5])
@pytest.mark.parametrize("base", [math.e, 2.0, 10.0])
@pytest.mark.parametrize("packed", [False, True])
def test_merge_states_matches_the_definition(
    merge, dtype: torch.dtype, states: int, base: float, packed: bool
) -> None:
    outs = [torch.randn(3, 2, 4, 24, dtype=dtype) for _ in range(states)]
    lses = [10 / math.log(base) * torch.randn(3, 4, 2) for _ in range(states)]
    for out, lse in zip(outs, lses, strict=True):
        empty = torch.rand(3, 4, 2) < 0.3
        lse[empty] = -torch.inf
        out[empty.transpose(1, 2)] = torch.nan  # an empty state's output may hold anything
    if packed:
        outs, lses = [out[0] for out in outs], [lse[0] for lse in lses]
    out, lse = merge(outs, lses, base=base)
    want, want_lse = reference.merge_states(outs, lses, base=base)
    # Log-sum-exps near 30 have a last place of 2e-6, and so have the weights.
    epsilon = max(torch.finfo(dtype).eps, 2e-6)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), want, rtol=epsilon, atol=4 * epsilon)
    assert torch.allclose(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


LARGEST = torch.finfo(torch.float32).max
# Of the states of one row each.
HUGE = [
    [3e38],
    [-3e38],
    [3e38, 3e38],
    [3e38, -3e38],
    [-3e38, -3e38, -torch.inf],
    [LARGEST, 1.0, -LARGEST],
    [-LARGEST, -LARGEST],
    [-LARGEST, 0.0],
    [1e38, torch.nextafter(torch.tensor(1e38), torch.tensor(torch.inf)).item()],
]


@on_every_backend
@pytest.mark.parametrize("base", [1 + 1e-9, math.e, 2.0, 10.0, 1e300])
@pytest.mark.parametrize("lses", HUGE, ids=str)
def test_merge_states_of_huge_log_sum_exps(merge, base: float, lses: list[float]) -> None:
    outs = [torch.randn(1, 1, 1, 8) for _ in lses]
    tensors = [torch.full((1, 1, 1), lse) for lse in lses]
    out, lse = merge(outs, tensors, base=base)
    want, want_lse = reference.merge_states(outs, tensors, base=base)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)


@on_every_backend
@pytest.mark.parametrize("lse", [torch.inf, torch.nan])
def test_merge_states_of_what_is_no_log_sum_exp(merge, lse: float) -> None:
    """FlashAttention-2's +inf for a row that saw nothing is to be replaced first, and not overlooked."""
    outs, lses = [torch.randn(1, 2, 1, 8) for _ in range(2)], [torch.zeros(1, 1, 2) for _ in range(2)]
    lses[1][0, 0, 1] = lse
    out, merged = merge(outs, lses, base=math.e)
    assert out[0, 0].isfinite().all() and merged[0, 0, 0].isfinite()
    assert out[0, 1].isnan().all() and merged[0, 0, 1].isnan()


def decode_emulated(**arguments) -> tuple[torch.Tensor, torch.Tensor]:
    load().configure(seed=torch.randint(2**31, ()).item())
    return torch.ops.lean_attn_emulated.decode(**arguments)


def decode_on_gpu(**arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(t.cpu() for t in lean_attention.decode(**{n: t.cuda() for n, t in arguments.items()}))


@pytest.mark.parametrize(
    "decode",
    [lean_attention.decode, decode_emulated, pytest.param(decode_on_gpu, marks=pytest.mark.gpu)],
    ids=["cpu", "emulated", "gpu"],
)
def test_huge_sinks(decode) -> None:
    """A sink is a state as well; the lowest number is one that some use for none."""
    case = Case(torch.bfloat16, lens=(300, 0), heads=6, kv_heads=2, head_dim=64)
    inputs = make_inputs(case)
    inputs["sinks"] = torch.tensor([3e38, -3e38, LARGEST, -LARGEST, -torch.inf, 1.0])
    for got, want in zip(decode(**inputs), reference.decode(**inputs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_pieces_of_a_context_merge_to_the_whole() -> None:
    inputs = make_inputs(Case(torch.float32, lens=(1000, 700), heads=8, kv_heads=2))
    inputs["seq_lens"] = None
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].nan_to_num(0.5)
    whole, whole_lse = lean_attention.decode(**inputs)
    pieces = []
    for span in (slice(0, 300), slice(300, 301), slice(301, None)):
        k, v = inputs["k_cache"][:, span], inputs["v_cache"][:, span]
        pieces.append(lean_attention.decode(inputs["q"], k, v, causal=False))
    out, lse = lean_attention.merge_states([p[0] for p in pieces], [p[1] for p in pieces])
    assert torch.allclose(out, whole, atol=1e-6)
    assert torch.allclose(lse, whole_lse, atol=1e-5)
