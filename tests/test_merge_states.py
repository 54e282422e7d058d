"""merge_states against its definition, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import lean_attention
from lean_attention import reference
from tests.backends import Backend, devices
from tests.cases import DTYPES, F32, SHORT, Case, make_inputs


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_matches_the_definition(backend: Backend, dtype: torch.dtype) -> None:
    for states, base, packed in itertools.product((1, 2, 5), (math.e, 2.0, 10.0), (False, True)):
        outs = [torch.randn(3, 2, 4, 24, dtype=dtype) for _ in range(states)]
        lses = [10 / math.log(base) * torch.randn(3, 4, 2) for _ in range(states)]
        for out, lse in zip(outs, lses, strict=True):
            empty = torch.rand(3, 4, 2) < 0.3
            lse[empty] = -torch.inf
            out[empty.transpose(1, 2)] = torch.nan  # an empty state's output may hold anything
        if packed:
            outs, lses = [out[0] for out in outs], [lse[0] for lse in lses]
        out, lse = backend.merge_states(outs, lses, base=base)
        want, want_lse = reference.merge_states(outs, lses, base=base)
        # Log-sum-exps near 30 have a last place of 2e-6, and so have the weights.
        epsilon = max(torch.finfo(dtype).eps, 2e-6)
        name = f"{states} states, base {base}, {'packed' if packed else 'batched'}"
        assert out.dtype == dtype
        assert torch.allclose(out.double(), want, rtol=epsilon, atol=4 * epsilon), name
        assert torch.allclose(lse.double(), want_lse, rtol=1e-6, atol=1e-6), name


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_the_dtype_of_the_result(backend: Backend, dtype: torch.dtype) -> None:
    """It is rounded once."""
    outs, lses = (
        [torch.randn(3, 2, 4, 24).to(dtype) for _ in range(3)],
        [torch.randn(3, 4, 2) for _ in range(3)],
    )
    want, want_lse = backend.merge_states([out.float() for out in outs], lses)
    for out_dtype in DTYPES:
        out, lse = backend.merge_states(outs, lses, out_dtype=out_dtype)
        assert torch.equal(out, want.to(out_dtype)) and torch.equal(lse, want_lse), out_dtype


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


@devices
def test_huge_log_sum_exps(backend: Backend) -> None:
    for base, lses in itertools.product((1 + 1e-9, math.e, 2.0, 10.0, 1e300), HUGE):
        outs = [torch.randn(1, 1, 1, 8) for _ in lses]
        tensors = [torch.full((1, 1, 1), lse) for lse in lses]
        out, lse = backend.merge_states(outs, tensors, base=base)
        want, want_lse = reference.merge_states(outs, tensors, base=base)
        print(f"base {base}: {lses}")
        torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)


@devices
def test_what_is_no_log_sum_exp(backend: Backend) -> None:
    """FlashAttention-2's +inf for a row that saw nothing is to be replaced first, and not overlooked."""
    for lse in (torch.inf, torch.nan):
        outs, lses = [torch.randn(1, 2, 1, 8) for _ in range(2)], [torch.zeros(1, 1, 2) for _ in range(2)]
        lses[1][0, 0, 1] = lse
        out, merged = backend.merge_states(outs, lses, base=math.e)
        assert out[0, 0].isfinite().all() and merged[0, 0, 0].isfinite(), lse
        assert out[0, 1].isnan().all() and merged[0, 0, 1].isnan(), lse


def test_pieces_of_a_context_merge_to_the_whole() -> None:
    inputs = make_inputs(Case(F32, lens=(1000, 700), heads=8))
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
