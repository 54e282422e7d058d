"""int8 caches whose queries, rows and scales are of very different sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lean_attention
from lean_attention import reference
from tests.helpers import assert_same

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HEADS_KV, DIM, TOKENS = 2, 136, 203  # a tail of columns, a short last run


def make_inputs(dtype: torch.dtype, group: int, q_len: int) -> dict[str, Tensor]:
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


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("group, q_len", [(1, 1), (7, 2)])
def test_sizes(setting: Callable, dtype: torch.dtype, group: int, q_len: int, instruction_set: str) -> None:
    inputs = make_inputs(dtype, group, q_len)
    setting(inputs)
    out, lse = lean_attention.decode(**inputs)
    assert_same(f"{setting.__name__}-{dtype}-g{group}-q{q_len}", inputs, out, lse)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("group", [1, 8])
def test_a_query_that_is_not_finite(
    value: float, dtype: torch.dtype, group: int, instruction_set: str
) -> None:
    """Its outputs are NaN, those of the rows beside it what they were."""
    inputs = make_inputs(dtype, group, q_len=1)
    want, _ = lean_attention.decode(**inputs)
    row = group - 1
    inputs["q"][0, 0, row, 5] = value
    out, lse = lean_attention.decode(**inputs)
    assert out[0, 0, row].isnan().all()
    assert not lse[0, row].isfinite().any()
    others = torch.arange(group * HEADS_KV) != row
    assert torch.equal(out[:, :, others], want[:, :, others])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_scale_that_is_not_a_number(dtype: torch.dtype, instruction_set: str) -> None:
    """It makes its own head's outputs NaN and no other's."""
    inputs = make_inputs(dtype, group=2, q_len=1)
    want, _ = reference.decode(**inputs)
    for name in ("k_scale", "v_scale"):
        broken = {**inputs, name: inputs[name].clone()}
        broken[name][0, 90, 1] = torch.nan
        out, _ = lean_attention.decode(**broken)
        assert out[0, 0, 2:].isnan().all()
        assert (out[0, 0, :2] - want[0, 0, :2]).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("group", [1, 2, 3])
def test_heads_per_pass(group: int, dtype: torch.dtype, instruction_set: str) -> None:
    """With one scale for all tokens, a head of few rows goes token by token with the others."""
    for kv_heads, head_dim in ((3, 40), (8, 128), (8, 8)):
        arguments = {
            "q": torch.randn(1, 1, group * kv_heads, head_dim, dtype=dtype),
            "k_cache": torch.randint(-128, 128, (1, 300, kv_heads, head_dim), dtype=torch.int8),
            "v_cache": torch.randint(-128, 128, (1, 300, kv_heads, head_dim), dtype=torch.int8),
            "k_scale": 0.02 * torch.rand(kv_heads),
            "v_scale": 0.02 * torch.rand(kv_heads),
        }
        out, lse = lean_attention.decode(**arguments, num_ctas=1)
        assert_same(f"{dtype}-g{group}-kv{kv_heads}-d{head_dim}", arguments, out, lse)
