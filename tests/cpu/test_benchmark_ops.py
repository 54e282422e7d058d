"""The ops that benchmarks compare decode with."""

from __future__ import annotations

import math

import pytest
import torch

import lean_attention
from tests.cases import BF16, E4M3, F32, Case, assert_close, make_inputs


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_the_schedules_that_stream_k_replaces(splits: int) -> None:
    case = Case(BF16, lens=(1500, 0, 129, 1), heads=8, q_len=2)
    inputs = make_inputs(case)
    assert_close(case, inputs, *torch.ops.lean_attn.decode_fixed_split(**inputs, splits=splits))


@pytest.mark.parametrize("layout", ["heads_first", "tokens_first"])
def test_reading_without_computing(layout: str) -> None:
    """In place of the whole op, whatever rows' length, so that a benchmark may take one from the other."""
    for dtype in (F32, BF16):
        case = Case(dtype, lens=(1500, 0, 129, 1), heads=8, head_dim=40, head_dim_v=8, layout=layout)
        inputs = make_inputs(case)
        out, lse = torch.ops.lean_attn.read_only(**inputs)
        want_out, want_lse = lean_attention.decode(**inputs)
        assert out.shape == want_out.shape and out.dtype == dtype
        assert lse.shape == want_lse.shape
        assert (out == 0).all() and (lse == -math.inf).all()


def test_reading_quantised_caches_without_computing() -> None:
    cache = torch.zeros(1, 64, 1, 64).to(E4M3)
    for dtype in (F32, BF16):
        out, lse = torch.ops.lean_attn.read_only(torch.zeros(1, 1, 1, 64, dtype=dtype), cache, cache)
        assert (out == 0).all() and (lse == -math.inf).all()
