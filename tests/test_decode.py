"""The op against its definition in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import lean_attention
from lean_attention import reference
from tests.helpers import Case, assert_close, make_inputs

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Head dims and groups (odd ones too), ragged lengths at the edges of runs and LeanTiles, more query rows
# than one block, windows.
CASES = [
    Case(F32, lens=(1,)),
    Case(F32, lens=(0,)),
    Case(F32, lens=(0, 1, 127, 128, 129, 300), heads=8, kv_heads=2),
    Case(BF16, lens=(63, 64, 65, 0, 255, 257), heads=8, kv_heads=2),
    Case(F16, lens=(3001, 5, 17), heads=14, kv_heads=2, head_dim=64),
    Case(BF16, lens=(3001, 5, 17), heads=14, kv_heads=2, head_dim=64),
    Case(F32, lens=(5000, 3, 900), heads=5, kv_heads=1, head_dim=80, head_dim_v=96),
    Case(F16, lens=(5000, 3, 900), heads=3, kv_heads=1, head_dim=80, head_dim_v=96),
    Case(BF16, lens=(5000, 3, 900), heads=5, kv_heads=1, head_dim=96, head_dim_v=80),
    Case(BF16, lens=(400, 77), heads=16, kv_heads=1, head_dim=192, head_dim_v=128),
    Case(F16, lens=(400, 77), heads=32, kv_heads=2, head_dim=256),
    Case(F32, lens=(400, 77), heads=9, kv_heads=1, head_dim=256),
    Case(F32, lens=(130, 90), heads=64, kv_heads=1, head_dim=8),
    Case(BF16, lens=(130, 90), heads=6, kv_heads=1, head_dim=8, head_dim_v=16),
    Case(F16, lens=(130, 90), heads=6, kv_heads=6, head_dim=24, head_dim_v=40),
    Case(BF16, lens=(130, 90), heads=12, kv_heads=6, head_dim=120, head_dim_v=104),
    Case(F32, lens=(700, 2, 0, 301), heads=4, kv_heads=2, q_len=4),
    Case(BF16, lens=(700, 2, 0, 301), heads=6, kv_heads=2, q_len=3),
    Case(F16, lens=(700, 2, 0, 301), heads=4, kv_heads=4, q_len=7, causal=False),
    Case(BF16, lens=(300, 131), heads=8, kv_heads=2, q_len=40),
    Case(F32, lens=(300, 131), heads=7, kv_heads=1, q_len=128),
    Case(F32, lens=(900, 40), heads=4, kv_heads=2, window_left=100),
    Case(BF16, lens=(900, 40), heads=4, kv_heads=2, q_len=5, window_left=64),
    Case(F16, lens=(900, 40), heads=4, kv_heads=2, q_len=5, causal=False, window_left=9, window_right=2),
    Case(F32, lens=(260, 40), heads=4, kv_heads=2, q_len=90, window_left=0),
    Case(BF16, lens=(20000, 1, 64), heads=8, kv_heads=2, head_dim=128),
    Case(F32, lens=(20000, 1, 64), heads=8, kv_heads=8, head_dim=64, scale=0.3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["tokens_first", "heads_first"])
def test_matches_the_definition(case: Case, layout: str, instruction_set: str) -> None:
    inputs = make_inputs(case, layout)
    assert_close(case, inputs, *lean_attention.decode(**inputs, **case.options()))


@pytest.mark.parametrize("num_ctas", [1, 2, 3, 5, 16, 61, 500, 2**40])
def test_every_grid_gives_the_result(num_ctas: int) -> None:
    case = Case(F32, lens=(700, 0, 129, 64), heads=6, kv_heads=2, q_len=2)
    inputs = make_inputs(case)
    assert_close(case, inputs, *lean_attention.decode(**inputs, num_ctas=num_ctas))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_results_are_bitwise_reproducible(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(dtype, lens=(5000, 12, 900), heads=8, kv_heads=2))
    first, first_lse = lean_attention.decode(**inputs, num_ctas=7)
    for _ in range(20):
        out, lse = lean_attention.decode(**inputs, num_ctas=7)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def test_whole_cache_without_lengths() -> None:
    case = Case(BF16, lens=(333, 333), heads=8, kv_heads=2)
    inputs = make_inputs(case)
    inputs["k_cache"] = inputs["k_cache"][:, :333]
    inputs["v_cache"] = inputs["v_cache"][:, :333]
    inputs["seq_lens"] = None
    assert_close(case, inputs, *lean_attention.decode(**inputs))


def test_strides_are_layout() -> None:
    """K and V as views of one pool, padded rows, every second head, strided lengths and queries."""
    case = Case(F32, lens=(200, 31), heads=4, kv_heads=2, head_dim=64)
    plain = make_inputs(case)
    tokens = plain["k_cache"].shape[1]
    pool = torch.full((2, tokens, 2, 4, 72), torch.nan)  # sequence, token, K or V, head, dim
    pool[:, :, 0, ::2, :64] = plain["k_cache"]
    pool[:, :, 1, ::2, 8:] = plain["v_cache"]
    q = torch.full((2, 1, 8, 66), torch.nan)
    q[:, :, 1::2, 1:65] = plain["q"]
    lens = torch.full((2, 3), 10**9, dtype=torch.int32)
    lens[:, 1] = plain["seq_lens"]
    views = {
        "q": q[:, :, 1::2, 1:65],
        "k_cache": pool[:, :, 0, ::2, :64],
        "v_cache": pool[:, :, 1, ::2, 8:],
        "seq_lens": lens[:, 1],
    }
    for a, b in zip(lean_attention.decode(**views), lean_attention.decode(**plain), strict=True):
        assert torch.equal(a, b)


def test_one_cache_shared_by_all_sequences() -> None:
    case = Case(BF16, lens=(150, 150, 150), heads=4, kv_heads=2)
    inputs = make_inputs(case)
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name][:1].expand(3, -1, -1, -1)
    assert_close(case, inputs, *lean_attention.decode(**inputs))


def test_more_than_two_to_the_31_elements_by_strides() -> None:
    """Two tokens whose rows lie 2^32 elements apart, in memory that is mapped but mostly never touched."""
    stride = 2**32
    storage = torch.empty(stride + 64, dtype=torch.float16)
    k = torch.as_strided(storage, (1, 2, 1, 64), (0, stride, 64, 1))
    k.copy_(torch.randn(1, 2, 1, 64))
    q = torch.randn(1, 1, 1, 64, dtype=torch.float16)
    inputs = {"q": q, "k_cache": k, "v_cache": k, "seq_lens": torch.tensor([2], dtype=torch.int32)}
    case = Case(F16, lens=(2,), heads=1, kv_heads=1, head_dim=64)
    assert_close(case, inputs, *lean_attention.decode(**inputs))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_long_contexts_keep_fp32_accuracy(kv_heads: int) -> None:
    """512k tokens: plain left-to-right fp32 sums would lose three digits. A pass takes two heads."""
    case = Case(F32, lens=(2**19,), heads=kv_heads, kv_heads=kv_heads, head_dim=8)
    inputs = make_inputs(case)
    inputs["v_cache"] += 1  # sums that do not cancel
    out, lse = lean_attention.decode(**inputs, num_ctas=1)
    want, want_lse = reference.decode(**inputs)
    assert ((out - want).abs() / want.abs()).max() < 4e-6
    assert (lse - want_lse).abs().max() < 4e-6


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_scores(offset: float) -> None:
    case = Case(F32, lens=(300,), heads=2, kv_heads=1, head_dim=64)
    inputs = make_inputs(case)
    inputs["q"][..., 0] = 8.0
    inputs["k_cache"][..., 0] = offset  # every score moves by the same amount
    assert_close(case, inputs, *lean_attention.decode(**inputs))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("rise", [0.02, 0.1, 0.5])
def test_scores_that_rise_along_the_context(rise: float, dtype: torch.dtype, instruction_set: str) -> None:
    """To 0 from -60 to -200, by a different step in each row; e^89 would overflow."""
    case = Case(dtype, lens=(min(3000, int(200 / rise)),), heads=7, kv_heads=1, head_dim=64)
    inputs = make_inputs(case)
    inputs["q"][..., -1] = torch.linspace(0, 1, 7, dtype=dtype)
    ramp = 8 * rise * (torch.arange(inputs["k_cache"].shape[1]) - case.lens[0])
    inputs["k_cache"][..., -1] += ramp[:, None].to(dtype)
    for num_ctas in (1, 3):
        assert_close(case, inputs, *lean_attention.decode(**inputs, num_ctas=num_ctas))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["k_cache", "v_cache"])
@pytest.mark.parametrize("place", [257, 299])
def test_non_finite_values_in_use_propagate(
    dtype: torch.dtype, value: float, where: str, place: int, instruction_set: str
) -> None:
    case = Case(dtype, lens=(300, 100), heads=4, kv_heads=2, head_dim=64)
    inputs = make_inputs(case)
    inputs[where][0, place, 1, 3] = value
    inputs["q"][..., 3].abs_()
    out, lse = lean_attention.decode(**inputs, num_ctas=5)
    want, want_lse = reference.decode(**inputs)
    for got, ref in ((out, want), (lse, want_lse)):
        assert torch.equal(got.isnan(), ref.isnan())
        assert torch.equal(got == torch.inf, ref == torch.inf)
        assert torch.equal(got == -torch.inf, ref == -torch.inf)


def test_all_scores_minus_infinity_is_an_empty_row() -> None:
    inputs = make_inputs(Case(F32, lens=(300,), heads=1, kv_heads=1, head_dim=8))
    inputs["q"].fill_(1.0)
    inputs["k_cache"].fill_(-torch.inf)
    out, lse = lean_attention.decode(**inputs)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_empty_batch_and_no_queries() -> None:
    for batch, q_len in ((0, 1), (2, 0)):
        q, k = torch.empty(batch, q_len, 4, 64), torch.empty(batch, 10, 2, 64)
        out, lse = lean_attention.decode(q, k, k)
        assert out.shape == (batch, q_len, 4, 64)
        assert lse.shape == (batch, 4, q_len)


def test_empty_cache() -> None:
    q, k = torch.randn(2, 1, 4, 64), torch.empty(2, 0, 2, 64)
    out, lse = lean_attention.decode(q, k, k)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_many_sequences() -> None:
    generator = torch.Generator().manual_seed(7)
    lens = torch.randint(0, 40, (4096,), generator=generator).tolist()
    lens[1234] = 3000
    case = Case(F32, lens=tuple(lens), heads=2, kv_heads=1, head_dim=8)
    inputs = make_inputs(case)
    out, lse = lean_attention.decode(**inputs, num_ctas=13)
    picked = torch.tensor([0, 1, 1233, 1234, 1235, 4095])
    subset = {name: tensor[picked] for name, tensor in inputs.items()}
    few = dataclasses.replace(case, lens=tuple(lens[i] for i in picked))
    assert_close(few, subset, out[picked], lse[picked])


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_the_schedules_that_stream_k_replaces(splits: int) -> None:
    case = Case(BF16, lens=(1500, 0, 129, 1), heads=8, kv_heads=2, q_len=2)
    inputs = make_inputs(case)
    assert_close(case, inputs, *torch.ops.lean_attn.decode_fixed_split(**inputs, splits=splits))


@pytest.mark.parametrize("layout", ["heads_first", "tokens_first"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reading_without_computing(dtype: torch.dtype, layout: str) -> None:
    """In place of the whole op, whatever rows' length, so that a benchmark may take one from the other."""
    case = Case(dtype, lens=(1500, 0, 129, 1), heads=8, kv_heads=2, head_dim=40, head_dim_v=8)
    inputs = make_inputs(case, layout)
    out, lse = torch.ops.lean_attn.read_only(**inputs)
    want_out, want_lse = lean_attention.decode(**inputs)
    assert out.shape == want_out.shape and out.dtype == dtype
    assert lse.shape == want_lse.shape
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reading_quantised_caches_without_computing(dtype: torch.dtype) -> None:
    cache = torch.zeros(1, 64, 1, 64).to(torch.float8_e4m3fn)
    out, lse = torch.ops.lean_attn.read_only(torch.zeros(1, 1, 1, 64, dtype=dtype), cache, cache)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("kv_heads", [13, 37])
@pytest.mark.parametrize("layout", ["tokens_first", "heads_first"])
def test_many_heads_per_pass(layout: str, kv_heads: int) -> None:
    """Ranges that begin and end inside heads, with whole ones between, longer than one chunk of tokens."""
    case = Case(F32, lens=(9000, 70), heads=2 * kv_heads, kv_heads=kv_heads, head_dim=8)
    inputs = make_inputs(case, layout)
    for num_ctas in (1, 2, 3):
        assert_close(case, inputs, *lean_attention.decode(**inputs, num_ctas=num_ctas))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_heads_of_every_width_in_a_pass(dtype: torch.dtype, group: int, instruction_set: str) -> None:
    """Few query rows multiply K token by token with all heads, in whole runs; the last run is a short one."""
    for i, head_dim in enumerate((8, 16, 24, 32, 40, 64, 72, 88, 96, 128, 136, 256)):
        kv_heads = (2, 3, 8)[(i + group) % 3]
        case = Case(dtype, lens=(200, 64, 0), heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim)
        inputs = make_inputs(case)
        assert_close(case, inputs, *lean_attention.decode(**inputs, num_ctas=1))


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


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("head_dim_v", [256, 264, 296, 312])
def test_every_value_of_a_quantised_cache(
    cache_dtype: torch.dtype, dtype: torch.dtype, head_dim_v: int, instruction_set: str
) -> None:
    """The output over a single token is its V: all 256 values, the first also as columns of a tail."""
    bits = torch.arange(head_dim_v).to(torch.uint8)
    values = bits.view(cache_dtype).float()
    finite = values.isfinite()
    one = torch.tensor(1.0)
    q = torch.randn(1, 1, 4, 64).to(dtype)
    k = torch.zeros(1, 1, 2, 64, dtype=torch.uint8).view(cache_dtype)
    v = bits.repeat(1, 1, 2, 1).view(cache_dtype)
    out, _ = lean_attention.decode(q, k, v, k_scale=one, v_scale=one)
    assert torch.equal(out[..., finite].float(), values[finite].expand(1, 1, 4, -1))
    assert not out[..., ~finite].isfinite().any()

    # A q that picks one column of a single K makes the lse that column's value.
    k = torch.where(finite, bits, 0)[:256].repeat(256, 1, 1, 1).view(cache_dtype)
    q = torch.eye(256).to(dtype).view(256, 1, 1, 256)
    _, lse = lean_attention.decode(q, k, k, k_scale=one, v_scale=one, scale=1.0)
    torch.testing.assert_close(lse.flatten(), k[0, 0, 0].float(), rtol=1e-6, atol=0)
