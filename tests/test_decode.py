"""decode against its definition in float64, on every backend."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lean_attention
from lean_attention import reference
from tests.backends import CPUS, DEVICES, Backend, Cpu, Emulated, devices, listed, on_each, only
from tests.cases import (
    BF16,
    CASES,
    E4M3,
    F16,
    F32,
    INDICES,
    INT8,
    SHORT,
    TOGETHER,
    Case,
    all_pairs,
    any_case,
    assert_close,
    assert_same_non_finite,
    case_of,
    in_dtypes,
    make_inputs,
    with_int64,
)

# Each on two instruction sets: cpu/test_kernels.py has all sizes on all of them.
ON_CPUS = [(CPUS[(i + j) % len(CPUS)], case) for i, case in enumerate(CASES) for j in range(2)]


@listed([*dict.fromkeys(ON_CPUS), *on_each(CASES, ["emulated", "cuda"])])
def test_matches_the_definition(case: Case, backend: Backend) -> None:
    inputs = make_inputs(case)
    assert_close(case, inputs, *backend.decode(**inputs))


# Shorter ones: what every lane of every warp does is emulated.
ON_CUDA = {
    "dtype": [BF16, F16],
    "lens": [(150, 1, 0), (63, 65, 64), (200, 3, 33)],
    "q_len": [1, 3, 9, "packed"],
}
PAIRS = [(chosen["backend"], case_of(chosen)) for chosen in all_pairs(backend=CPUS)]
PAIRS_ON_CUDA = [case_of(chosen) for chosen in all_pairs(**ON_CUDA)]


@listed([*PAIRS, *on_each(PAIRS_ON_CUDA, ["emulated"])])
def test_pairs_of_features(case: Case, backend: Backend) -> None:
    """Every value of every feature with every one of every other, and on every instruction set."""
    inputs = make_inputs(case)
    assert_close(case, inputs, *backend.decode(**inputs))


@only("cuda")
def test_all_pairs_of_features(backend: Backend) -> None:
    for case in PAIRS_ON_CUDA:
        inputs = make_inputs(case)
        assert_close(case, inputs, *backend.decode(**inputs))


@listed(on_each(TOGETHER, DEVICES))
def test_many_features(case: Case, backend: Backend) -> None:
    inputs = make_inputs(case)
    assert_close(case, inputs, *backend.decode(**inputs))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(case=any_case())
def test_any_combination_of_features(case: Case) -> None:
    inputs = make_inputs(case)
    assert_close(case, inputs, *lean_attention.decode(**inputs))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(case=any_case(**ON_CUDA), seed=st.integers(0, 2**32))
def test_any_combination_of_features_emulated(case: Case, seed: int) -> None:
    backend = Emulated()
    backend.device.configure(seed=seed, resident_ctas=1 + seed % 7, sms=1 + seed % 5)
    inputs = make_inputs(case)
    assert_close(case, inputs, *backend.decode(**inputs))


def assert_same_in_int64(case: Case, backend: Backend, names: Iterable[str]) -> None:
    inputs = make_inputs(case)
    wanted = backend.decode(**inputs)
    for got, want in zip(backend.decode(**with_int64(inputs, names)), wanted, strict=True):
        assert torch.equal(got, want), f"{case} with {', '.join(names)}"


# Whole steps and partial ones, tables per head, 8-bit rows whose scales are looked up too.
WITH_INDICES = [
    Case(q_len="packed", layout="paged", leftpad=True),
    Case(q_len=3, layout="slots", leftpad=True, window_left=40),
    Case(layout="table_per_head", block_size=32),
    Case(layout="pool", block_size=12, quantised=INT8, scales="row"),
    Case(lens=(333, 17), layout="paged_heads_first", quantised=E4M3, scales="head", num_ctas=5),
    Case(heads=3, kv_heads=1, head_dim=512, layout="paged", q_len="packed"),
]


@listed(on_each(WITH_INDICES, DEVICES))
def test_indices_in_int64(case: Case, backend: Backend) -> None:
    for names in (INDICES, *((name,) for name in INDICES if name in make_inputs(case))):
        assert_same_in_int64(case, backend, names)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=any_case(), names=st.sets(st.sampled_from(INDICES), min_size=1))
def test_any_indices_in_int64(case: Case, names: set[str]) -> None:
    assert_same_in_int64(case, Cpu(), names)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(case=any_case(**ON_CUDA), names=st.sets(st.sampled_from(INDICES), min_size=1))
def test_any_indices_in_int64_emulated(case: Case, names: set[str]) -> None:
    assert_same_in_int64(case, Emulated(), names)


@devices
def test_left_padding_of_more_than_32_bits(backend: Backend) -> None:
    inputs = make_inputs(Case(lens=(300, 40), leftpad=True))
    for padding in (2**31 - 1, 2**32 + 5, 2**63 - 1):
        inputs["cache_leftpad"] = torch.tensor([33, padding])
        out, lse = backend.decode(**inputs)
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and (out[0] != 0).any(), padding


@devices
@pytest.mark.parametrize("case", [Case(F16, lens=(700, 0, 129, 64), heads=6, q_len=2)], ids=str)
def test_every_grid_gives_the_result(case: Case, backend: Backend) -> None:
    inputs = make_inputs(case)
    for num_ctas in (1, 2, 3, 5, 16, 61, 500, 2**40):
        inputs["num_ctas"] = num_ctas
        assert_close(f"{case}-ctas{num_ctas}", inputs, *backend.decode(**inputs))


@only("cpu", "cuda")  # test_cuda.py: the emulated device, for other interleavings
def test_results_are_bitwise_reproducible(backend: Backend) -> None:
    for dtype in backend.dtypes:
        inputs = make_inputs(Case(dtype, lens=(5000, 12, 900), heads=8, num_ctas=7))
        first, first_lse = backend.decode(**inputs)
        for _ in range(20):
            out, lse = backend.decode(**inputs)
            assert torch.equal(out, first) and torch.equal(lse, first_lse), dtype


@devices
def test_whole_cache_without_lengths(backend: Backend) -> None:
    case = Case(BF16, lens=(333, 333), heads=8)
    inputs = make_inputs(case)
    inputs["k_cache"] = inputs["k_cache"][:, :333]
    inputs["v_cache"] = inputs["v_cache"][:, :333]
    inputs["seq_lens"] = None
    assert_close(case, inputs, *backend.decode(**inputs))


@devices
@pytest.mark.parametrize("pad", [8, 1, 2])
def test_strides_are_layout(pad: int, backend: Backend) -> None:
    """K and V as views of one pool, every second head, strided lengths and queries; rows that begin at
    multiples of 16 bytes (pad 8) and not (pads 1 and 2)."""
    case = Case(F16, lens=(200, 31), head_dim=64)
    plain = make_inputs(case)
    tokens = plain["k_cache"].shape[1]
    pool = torch.full((2, tokens, 2, 4, 64 + pad), torch.nan, dtype=F16)  # sequence, token, K or V, head, dim
    q = torch.full((2, 1, 8, 64 + 2 * pad), torch.nan, dtype=F16)
    lens = torch.full((2, 3), 10**9, dtype=torch.int32)
    views = {
        "q": q[:, :, 1::2, pad : pad + 64],
        "k_cache": pool[:, :, 0, ::2, :64],
        "v_cache": pool[:, :, 1, ::2, pad:],
        "seq_lens": lens[:, 1],
    }
    for name, view in views.items():
        view.copy_(plain[name])
    for got, want in zip(backend.decode(**views), backend.decode(**plain), strict=True):
        assert torch.equal(got, want)


@devices
def test_one_cache_shared_by_all_sequences(backend: Backend) -> None:
    case = Case(BF16, lens=(150, 150, 150))
    inputs = make_inputs(case)
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name][:1].expand(3, -1, -1, -1)
    assert_close(case, inputs, *backend.decode(**inputs))


@only("cpu", "emulated")
def test_more_than_two_to_the_31_elements_by_strides(backend: Backend) -> None:
    """Two tokens whose rows lie 2^32 elements apart, in memory that is mapped but mostly never touched."""
    stride = 2**32
    storage = torch.empty(stride + 64, dtype=F16)
    k = torch.as_strided(storage, (1, 2, 1, 64), (0, stride, 64, 1))
    k.copy_(torch.randn(1, 2, 1, 64))
    case = Case(F16, lens=(2,), heads=1, kv_heads=1, head_dim=64)
    inputs = {**make_inputs(case), "k_cache": k, "v_cache": k}
    assert_close(case, inputs, *backend.decode(**inputs))


def test_long_contexts_keep_fp32_accuracy() -> None:
    """512k tokens: plain left-to-right fp32 sums would lose three digits. A pass takes two heads."""
    for kv_heads in (1, 2):
        inputs = make_inputs(Case(F32, lens=(2**19,), heads=kv_heads, kv_heads=kv_heads, head_dim=8))
        inputs["v_cache"] += 1  # sums that do not cancel
        out, lse = lean_attention.decode(**inputs, num_ctas=1)
        want, want_lse = reference.decode(**inputs)
        assert ((out - want).abs() / want.abs()).max() < 4e-6, kv_heads
        assert (lse - want_lse).abs().max() < 4e-6, kv_heads


@devices
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_scores(offset: float, backend: Backend) -> None:
    # Many heads: the largest error of the plain sum, which the bound comes from, is steadier then.
    case = in_dtypes(Case(F32, lens=(300,), heads=16, kv_heads=4, head_dim=64), backend.dtypes)
    inputs = make_inputs(case)
    inputs["q"][..., 0] = 8.0
    inputs["k_cache"][..., 0] = offset  # every score moves by the same amount
    assert_close(case, inputs, *backend.decode(**inputs))


def test_scores_that_rise_along_the_context(backend: Backend) -> None:
    """To 0 from -60 to -200, by a different step in each row; e^89 would overflow."""
    for rise, dtype in itertools.product((0.02, 0.1, 0.5), backend.dtypes):
        case = Case(dtype, lens=(min(3000, int(200 / rise)),), heads=7, kv_heads=1, head_dim=64)
        inputs = make_inputs(case)
        inputs["q"][..., -1] = torch.linspace(0, 1, 7, dtype=dtype)
        ramp = 8 * rise * (torch.arange(inputs["k_cache"].shape[1]) - case.lens[0])
        inputs["k_cache"][..., -1] += ramp[:, None].to(dtype)
        for num_ctas in (1, 3):
            inputs["num_ctas"] = num_ctas
            assert_close(f"{case}, rise {rise}, {num_ctas} CTAs", inputs, *backend.decode(**inputs))


@pytest.mark.parametrize("where", ["k_cache", "v_cache"])
def test_non_finite_values_in_use_propagate(where: str, backend: Backend) -> None:
    values, places = (torch.nan, torch.inf, -torch.inf), (257, 299)
    for dtype, value, place in itertools.product(backend.dtypes, values, places):
        case = Case(dtype, lens=(300, 100), head_dim=64)
        inputs = make_inputs(case)
        inputs[where][0, place, 1, 3] = value
        inputs["q"][..., 3].abs_()
        got = backend.decode(**inputs, num_ctas=5)
        assert_same_non_finite(f"{case}, {value} at {place}", got, reference.decode(**inputs))


@devices
def test_all_scores_minus_infinity_is_an_empty_row(backend: Backend) -> None:
    inputs = make_inputs(in_dtypes(Case(F32, lens=(300,), heads=1, kv_heads=1, head_dim=8), backend.dtypes))
    inputs["q"].fill_(1.0)
    inputs["k_cache"].fill_(-torch.inf)
    out, lse = backend.decode(**inputs)
    assert (out == 0).all() and (lse == -torch.inf).all()


@devices
def test_empty_batches_queries_and_caches(backend: Backend) -> None:
    for batch, q_len, tokens in ((0, 1, 10), (2, 0, 10), (2, 1, 0)):
        q, cache = torch.randn(batch, q_len, 4, 64).to(BF16), torch.randn(batch, tokens, 2, 64).to(BF16)
        out, lse = backend.decode(q=q, k_cache=cache, v_cache=cache)
        assert out.shape == (batch, q_len, 4, 64) and lse.shape == (batch, 4, q_len)
        assert (out == 0).all() and (lse == -torch.inf).all()


@devices
def test_packed_queries_of_no_sequence(backend: Backend) -> None:
    """As in a captured graph whose batch has gone: rows that see nothing, not what memory held."""
    for batch, num_ctas in itertools.product((0, 2), (0, 3)):
        cache = torch.randn(batch, 40, 2, 64).to(BF16)
        out, lse = backend.decode(
            q=torch.randn(3, 4, 64).to(BF16),
            k_cache=cache,
            v_cache=cache,
            seq_lens=torch.full((batch,), 17, dtype=torch.int32),
            cu_seqlens_q=torch.zeros(batch + 1, dtype=torch.int32),
            num_ctas=num_ctas,
        )
        assert (out == 0).all() and (lse == -torch.inf).all(), f"batch of {batch}, {num_ctas} CTAs"


@devices
def test_many_sequences(backend: Backend) -> None:
    lens = torch.randint(0, 40, (4096,)).tolist()
    lens[1234] = 3000
    case = in_dtypes(Case(F32, lens=tuple(lens), heads=2, kv_heads=1, head_dim=8), backend.dtypes)
    inputs = make_inputs(case)
    out, lse = backend.decode(**inputs, num_ctas=13)
    picked = torch.tensor([0, 1, 1233, 1234, 1235, 4095])
    subset = {name: tensor[picked] for name, tensor in inputs.items()}
    few = dataclasses.replace(case, lens=tuple(lens[i] for i in picked))
    assert_close(few, subset, out[picked], lse[picked])


@devices
def test_huge_sinks(backend: Backend) -> None:
    """A sink is a state as well; the lowest number is one that some use for none."""
    largest = torch.finfo(F32).max
    inputs = make_inputs(Case(BF16, lens=(300, 0), heads=6, head_dim=64))
    inputs["sinks"] = torch.tensor([3e38, -3e38, largest, -largest, -torch.inf, 1.0])
    for got, want in zip(backend.decode(**inputs), reference.decode(**inputs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


# Contexts so long that a CPU takes several heads through them together, in ranges that are merged.
HEADS_PER_PASS = [
    # Ranges that begin and end inside heads, with whole ones between, longer than one chunk of tokens.
    *(Case(F32, lens=(9000, 70), heads=26, kv_heads=13, head_dim=8, num_ctas=ctas) for ctas in (1, 2)),
    Case(F32, lens=(9000, 70), heads=26, kv_heads=13, head_dim=8, layout="heads_first", num_ctas=3),
    Case(F32, lens=(9000, 70), heads=74, kv_heads=37, head_dim=8, num_ctas=3),
    Case(F32, lens=(9000, 70), heads=74, kv_heads=37, head_dim=8, layout="heads_first", num_ctas=2),
    # The tokens of a run out of order where no row needs to know a token's place.
    *(
        Case(
            F32, (8500, 70, 0), 2 * kv_heads, kv_heads, 40, 24, quantised=quantised,
            scales="row" if quantised else "", layout=layout, softcap=5.0, alibi=alibi, sinks=True,
            leftpad=True, num_ctas=3, name=f"long-kv{kv_heads}-{layout}-{SHORT.get(quantised, 'f32')}",
        )
        for kv_heads, layout, quantised, alibi in (
            (10, "tokens_first", None, ""),
            (3, "slots", INT8, "heads"),
            (10, "pool", E4M3, "heads"),
            (3, "paged", None, ""),
            (10, "paged", None, "heads"),
            (3, "paged_heads_first", INT8, ""),
        )
    ),
]  # fmt: skip


@listed(on_each(HEADS_PER_PASS, ["cpu"]))
def test_heads_per_pass(case: Case, backend: Backend) -> None:
    inputs = make_inputs(case)
    assert_close(case, inputs, *backend.decode(**inputs))
