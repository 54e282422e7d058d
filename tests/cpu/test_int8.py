"""int8 caches whose queries, rows and scales are of very different sizes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import lean_attention
from lean_attention import reference
from tests.cases import DTYPES, F16, INT8, Case, assert_close, make_inputs

HEADS_KV, DIM, TOKENS = 2, 136, 203  # a tail of columns, a short last run


def int8_inputs(dtype: torch.dtype, group: int, q_len: int) -> dict[str, Tensor]:
    shape = (1, TOKENS, HEADS_KV)
    return {
        "q": torch.randn(1, q_len, group * HEADS_KV, DIM, dtype=dtype),
        "k_cache": torch.randint(-128, 128, (*shape, DIM), dtype=torch.int8),
        "v_cache": torch.randint(-128, 128, (*shape, DIM), dtype=torch.int8),
        "k_scale": 0.01 * (0.5 + torch.rand(shape)),
        "v_scale": 0.01 * (0.5 + torch.rand(shape)),
    }


def outlier_in_q(x: dict[str, Tensor]) -> None:
    """What decides are columns some 2^20 times smaller than one that no K row has."""
    x["q"] *= 0.01
    x["q"][..., 7] = 1e4
    x["k_cache"][..., 7] = 0


def tiny_q(x: dict[str, Tensor]) -> None:
    x["q"] *= 1e-6 if x["q"].dtype == F16 else 1e-36  # with subnormal numbers


def zero_q(x: dict[str, Tensor]) -> None:
    x["q"].zero_()


def lowest_rows(x: dict[str, Tensor]) -> None:
    x["k_cache"].fill_(-128)
    x["v_cache"].fill_(-128)


def rows_of_zeros(x: dict[str, Tensor]) -> None:
    """The tokens with nearly all weight have V rows of zeros and the largest scale."""
    x["k_scale"][:, ::50] = 0
    x["q"][..., 3] = -8
    x["k_cache"][..., 3] = 127
    x["v_cache"][:, ::50] = 0
    x["v_scale"][:, ::50] = 1


def scales_of_zero(x: dict[str, Tensor]) -> None:
    x["k_scale"][:, ::3] = 0
    x["v_scale"][:, ::5] = 0


def scales_of_every_size(x: dict[str, Tensor]) -> None:
    x["k_scale"] *= torch.exp2(torch.randint(-30, 2, x["k_scale"].shape).float())
    x["v_scale"] *= torch.exp2(torch.randint(-60, 10, x["v_scale"].shape).float())


def negative_scales(x: dict[str, Tensor]) -> None:
    x["k_scale"] *= torch.randn_like(x["k_scale"])
    x["v_scale"] *= torch.randn_like(x["v_scale"])


SETTINGS = [
    outlier_in_q,
    tiny_q,
    zero_q,
    lowest_rows,
    rows_of_zeros,
    scales_of_zero,
    scales_of_every_size,
    negative_scales,
]


def test_sizes(instruction_set: str) -> None:
    for setting, dtype, (group, q_len) in itertools.product(SETTINGS, DTYPES, [(1, 1), (7, 2)]):
        inputs = int8_inputs(dtype, group, q_len)
        setting(inputs)
        out, lse = lean_attention.decode(**inputs)
        assert_close(f"{setting.__name__}-{dtype}-g{group}-q{q_len}", inputs, out, lse)


def test_a_query_that_is_not_finite(instruction_set: str) -> None:
    """Its outputs are NaN, those of the rows beside it what they were."""
    for value, dtype, group in itertools.product((torch.nan, torch.inf), DTYPES, (1, 8)):
        inputs = int8_inputs(dtype, group, q_len=1)
        want, _ = lean_attention.decode(**inputs)
        row = group - 1
        inputs["q"][0, 0, row, 5] = value
        out, lse = lean_attention.decode(**inputs)
        name = f"{value}-{dtype}-g{group}"
        assert out[0, 0, row].isnan().all(), name
        assert not lse[0, row].isfinite().any(), name
        others = torch.arange(group * HEADS_KV) != row
        assert torch.equal(out[:, :, others], want[:, :, others]), name


def test_a_scale_that_is_not_a_number(instruction_set: str) -> None:
    """It makes its own head's outputs NaN and no other's."""
    for dtype, name in itertools.product(DTYPES, ("k_scale", "v_scale")):
        inputs = int8_inputs(dtype, group=2, q_len=1)
        want, _ = reference.decode(**inputs)
        inputs[name][0, 90, 1] = torch.nan
        out, _ = lean_attention.decode(**inputs)
        assert out[0, 0, 2:].isnan().all(), (name, dtype)
        assert (out[0, 0, :2] - want[0, 0, :2]).abs().max() < 0.02, (name, dtype)


def test_heads_per_pass(instruction_set: str) -> None:
    """With one scale for all tokens, a head of few rows goes token by token with the others."""
    shapes = ((3, 40), (8, 128), (8, 8))
    for dtype, group, (kv_heads, head_dim) in itertools.product(DTYPES, (1, 2, 3), shapes):
        case = Case(
            dtype, (300,), group * kv_heads, kv_heads, head_dim, quantised=INT8, scales="head", num_ctas=1
        )
        inputs = make_inputs(case)
        assert_close(case, inputs, *lean_attention.decode(**inputs))
