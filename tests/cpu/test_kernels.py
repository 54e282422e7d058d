"""Every kernel of every instruction set that this machine has, and every value that they convert."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from allpairspy import AllPairs

import lean_attention
from tests.cases import (
    DTYPES,
    E4M3,
    INT8,
    QUANTISED,
    SHORT,
    Case,
    all_pairs,
    assert_close,
    case_of,
    make_inputs,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)


@dtypes
def test_every_microkernel(dtype: torch.dtype, instruction_set: str) -> None:
    """All counts of rows that the kernels have code of their own for, and tails of head dims."""
    groups = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 20, 33, 48, 64, 101]
    for group, head_dim in AllPairs([groups, [64, 80, 128, 256]]):
        case = Case(dtype, lens=(70, 200), heads=group, kv_heads=1, head_dim=head_dim)
        inputs = make_inputs(case)
        assert_close(case, inputs, *lean_attention.decode(**inputs))
    for group, head_dim in zip(
        groups, (8, 16, 24, 40, 120, 136, 192, 200, 264, 448, 512, 72, 328, 104, 8), strict=True
    ):
        case = Case(dtype, (70, 200), group, kv_heads=1, head_dim=head_dim, head_dim_v=520 - head_dim)
        inputs = make_inputs(case)
        assert_close(case, inputs, *lean_attention.decode(**inputs))


def test_many_rows_with_every_feature(instruction_set: str) -> None:
    """Rows that differ in what they see, and quantised rows; prompts are such tiles."""
    for chosen in all_pairs(q_len=[13, 40]):
        case = case_of(chosen)
        print(case)
        inputs = make_inputs(case)
        assert_close(case, inputs, *lean_attention.decode(**inputs))


def test_short_runs_of_short_rows(instruction_set: str) -> None:
    """Many microkernels prefetch fewer bytes than they are: there is a byte or less for each."""
    for dtype, quantised in itertools.product(DTYPES, (None, INT8, E4M3)):
        for head_dim, rows, last in AllPairs([[8, 16, 24], [65, 101, 128], [1, 2, 3, 63]]):
            case = Case(
                dtype, (64 + last, last), rows, 1, head_dim, quantised=quantised, layout="heads_first"
            )
            if quantised:
                case = replace(case, scales="scalar")
            print(case)
            inputs = make_inputs(case)
            assert_close(case, inputs, *lean_attention.decode(**inputs))


@pytest.mark.usefixtures("count_is_restored")
@dtypes
def test_what_a_thread_did_before_leaves_no_trace(dtype: torch.dtype, instruction_set: str) -> None:
    """A tile's bits are the same after a larger one whose maxima are small: lanes are left over."""
    torch.set_num_threads(1)
    for before, rows in ((100, 20), (64, 9), (128, 5), (40, 3), (33, 6)):
        cu_seqlens_q = torch.tensor([0, rows, rows + before], dtype=torch.int32)
        q, k, v = torch.randn(rows + before, 1, 64), *torch.randn(2, 2, 2048, 1, 64)
        q[rows:], k[1] = q[rows:].abs(), 3 * k[1].abs()
        results = []
        for sign in (1, -1):
            k[1] *= sign
            out, lse = lean_attention.decode(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                torch.full((2,), 2000, dtype=torch.int32),
                cu_seqlens_q=cu_seqlens_q,
                window_left=1500,
                num_ctas=2,
            )
            results.append((out[:rows], lse[:, :rows]))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other), f"{rows} rows after {before}"


@dtypes
def test_heads_of_every_width_in_a_pass(dtype: torch.dtype, instruction_set: str) -> None:
    """Few query rows multiply K token by token with all heads, in whole runs; the last run is a short one."""
    head_dims = [8, 16, 24, 32, 40, 64, 72, 88, 96, 128, 136, 256]
    for head_dim, group, kv_heads in AllPairs([head_dims, [1, 2, 3, 4, 5], [2, 3, 8]]):
        case = Case(dtype, (200, 64, 0), group * kv_heads, kv_heads, head_dim, num_ctas=1)
        inputs = make_inputs(case)
        assert_close(case, inputs, *lean_attention.decode(**inputs))


def test_exp_is_right_to_2e_7(instruction_set: str) -> None:
    """Two tokens with v = 0 and 1: the output is w / (1 + w) for the second one's weight w = 2^-x."""
    x = torch.arange(1, 125 * 64, dtype=torch.float64) / 64
    q = torch.ones(len(x), 1, 1, 8)
    k, v = torch.zeros(len(x), 2, 1, 8), torch.zeros(len(x), 2, 1, 8)
    k[:, 1, 0, 0], v[:, 1] = -x.float(), 1.0
    out, _ = lean_attention.decode(q, k, v, scale=math.log(2))  # scores are -x in units of log2, exactly
    weight = torch.exp2(-x)
    error = out[:, 0, 0, 0].double() / (weight / (1 + weight)) - 1
    assert error.abs().max() < 4e-7  # the bound of exp, and the roundings of the sum and the division


def test_every_value_of_a_quantised_cache(instruction_set: str) -> None:
    for cache_dtype in QUANTISED:
        print(cache_dtype)
        check_every_value(cache_dtype)


def check_every_value(cache_dtype: torch.dtype) -> None:
    """The output over a single token is its V: all 256 values, the first also as columns of a tail."""
    one = torch.tensor(1.0)
    for dtype, head_dim_v in itertools.product(DTYPES, (256, 264, 296, 312)):
        name = f"{SHORT[dtype]}-{head_dim_v}"
        bits = torch.arange(head_dim_v).to(torch.uint8)
        values = bits.view(cache_dtype).float()
        finite = values.isfinite()
        q = torch.randn(1, 1, 4, 64).to(dtype)
        k = torch.zeros(1, 1, 2, 64, dtype=torch.uint8).view(cache_dtype)
        v = bits.repeat(1, 1, 2, 1).view(cache_dtype)
        out, _ = lean_attention.decode(q, k, v, k_scale=one, v_scale=one)
        assert torch.equal(out[..., finite].float(), values[finite].expand(1, 1, 4, -1)), name
        assert not out[..., ~finite].isfinite().any(), name

    # A q that picks one column of a single K makes the lse that column's value.
    bits = torch.arange(256).to(torch.uint8)
    finite = bits.view(cache_dtype).float().isfinite()
    k = torch.where(finite, bits, 0).repeat(256, 1, 1, 1).view(cache_dtype)
    for dtype in DTYPES:
        q = torch.eye(256).to(dtype).view(256, 1, 1, 256)
        _, lse = lean_attention.decode(q, k, k, k_scale=one, v_scale=one, scale=1.0)
        torch.testing.assert_close(lse.flatten(), k[0, 0, 0].float(), rtol=1e-6, atol=0)
