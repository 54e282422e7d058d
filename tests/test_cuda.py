"""The CUDA kernels: on the emulated device everywhere, and the same tests on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lean_attention
from lean_attention import reference
from tests.emulation import load
from tests.helpers import Case, assert_close, assert_same, make_inputs
from tests.matrix import TOGETHER, FeatureCase, all_pairs, any_case, make_arguments
from tests.test_decode import CASES

F16, BF16 = torch.float16, torch.bfloat16
Decode = Callable[..., tuple[Tensor, Tensor]]

SMALL_CASES = [
    dataclasses.replace(case, dtype=BF16 if case.dtype == torch.float32 else case.dtype) for case in CASES
]


def decode_emulated(**arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.lean_attn_emulated.decode(**arguments)


def decode_on_gpu(**arguments) -> tuple[Tensor, Tensor]:
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    out, lse = lean_attention.decode(**moved)
    return out.cpu(), lse.cpu()


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def decode(request: pytest.FixtureRequest) -> Decode:
    if request.param == "gpu":
        return decode_on_gpu
    seed = random.randrange(2**32)
    print(f"emulated device: seed={seed}")
    load().configure(seed=seed, resident_ctas=1 + seed % 7, sms=1 + seed % 5)
    return decode_emulated


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
@pytest.mark.parametrize("layout", ["tokens_first", "heads_first"])
def test_matches_the_definition(case: Case, layout: str, decode: Decode) -> None:
    inputs = make_inputs(case, layout)
    assert_close(case, inputs, *decode(**inputs, **case.options()))


SMALL = {
    "dtype": [BF16, F16],
    "lens": [(150, 1, 0), (63, 65, 64), (200, 3, 33)],
    "query": [1, 3, 9, "packed"],
}


@pytest.mark.parametrize("case", [*all_pairs(**SMALL), *TOGETHER], ids=str)
def test_pairs_of_features(case: FeatureCase, decode: Decode) -> None:
    arguments = make_arguments(case)
    assert_same(str(case), arguments, *decode(**arguments))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(case=any_case(**SMALL), seed=st.integers(0, 2**32))
def test_any_combination_of_features(case: FeatureCase, seed: int) -> None:
    load().configure(seed=seed, resident_ctas=1 + seed % 7, sms=1 + seed % 5)
    arguments = make_arguments(case)
    assert_same(str(case), arguments, *decode_emulated(**arguments))


@pytest.mark.parametrize("num_ctas", [1, 2, 3, 5, 16, 61, 500, 2**40])
def test_every_grid_gives_the_result(num_ctas: int, decode: Decode) -> None:
    case = Case(F16, lens=(700, 0, 129, 64), heads=6, kv_heads=2, q_len=2)
    inputs = make_inputs(case)
    assert_close(case, inputs, *decode(**inputs, num_ctas=num_ctas))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_every_kernel(head_dim: int, rows: int, decode: Decode) -> None:
    for dtype in (F16, BF16):
        case = Case(dtype, lens=(333, 15), heads=rows, kv_heads=1, head_dim=head_dim)
        inputs = make_inputs(case)
        assert_close(case, inputs, *decode(**inputs, num_ctas=3))


@pytest.mark.slow
def test_random_interleavings() -> None:
    """One result, whatever the order in which 200 launches' CTAs, warps and lanes advance."""
    emulated, shapes = load(), random.Random()
    case = Case(BF16, lens=(900, 0, 65, 300), heads=6, kv_heads=2, head_dim=64, q_len=2)
    inputs = make_inputs(case)
    first = None
    for _ in range(200):
        seed = shapes.randrange(2**32)
        emulated.configure(seed=seed, resident_ctas=shapes.randint(1, 12))
        out, lse = decode_emulated(**inputs, num_ctas=11)
        if first is None:
            assert_close(case, inputs, out, lse)
            first = out, lse
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1]), f"emulated device: seed={seed}"


def test_two_launches_at_once() -> None:
    emulated = load()
    cases = [
        Case(BF16, lens=(900, 65), heads=4, kv_heads=2, head_dim=64),
        Case(F16, lens=(40, 700), heads=3, kv_heads=1, head_dim=80),
    ]
    for seed in range(20):
        emulated.configure(seed=seed, resident_ctas=1 + seed % 6, deferred=True)
        inputs = [make_inputs(case) for case in cases]
        results = [decode_emulated(**i, num_ctas=7) for i in inputs]
        emulated.run()
        for case, arguments, result in zip(cases, inputs, results, strict=True):
            assert_close(case, arguments, *result)


@pytest.mark.slow
def test_replays_with_changing_lengths() -> None:
    """What a captured CUDA graph does: the same arguments and workspace, other lengths and queries."""
    emulated = load()
    emulated.configure(seed=11, resident_ctas=3)
    case = Case(BF16, lens=(600, 20, 300), heads=4, kv_heads=2, head_dim=64)
    inputs = make_inputs(case)
    for cache in (inputs["k_cache"], inputs["v_cache"]):
        cache.copy_(torch.randn(cache.shape))
    out, lse = decode_emulated(**inputs)
    for _ in range(100):
        lens = torch.randint(0, 601, (3,), dtype=torch.int32)
        inputs["seq_lens"].copy_(lens)
        inputs["q"].normal_()
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        emulated.replay()
        assert_close(dataclasses.replace(case, lens=tuple(lens.tolist())), inputs, out, lse)


def test_the_launch_does_not_depend_on_lengths() -> None:
    """One launch, and a grid from shapes alone: the property that makes captured graphs right."""
    emulated, grids = load(), set()
    for lens in ((5000, 5000), (0, 0), (1, 4999)):
        emulated.configure(seed=1)
        inputs = make_inputs(Case(BF16, lens=(5000, 5000), heads=2, kv_heads=1, head_dim=64))
        inputs["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        decode_emulated(**inputs)
        assert emulated.launches() == 1
        grids.add(emulated.last_grid())
    assert len(grids) == 1


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("num_ctas", [0, 3])
@pytest.mark.parametrize("batch", [0, 2])
def test_packed_queries_of_no_sequence(backend: str, num_ctas: int, batch: int, decode: Decode) -> None:
    """As in a captured graph whose batch has gone: rows that see nothing, not what memory held."""
    cache = torch.randn(batch, 40, 2, 64).to(BF16)
    arguments = {
        "q": torch.randn(3, 4, 64).to(BF16),
        "k_cache": cache,
        "v_cache": cache,
        "seq_lens": torch.full((batch,), 17, dtype=torch.int32),
        "cu_seqlens_q": torch.zeros(batch + 1, dtype=torch.int32),
        "num_ctas": num_ctas,
    }
    out, lse = (lean_attention.decode if backend == "cpu" else decode)(**arguments)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("first", [2, -1])
def test_packed_queries_before_the_first_sequence(first: int, decode: Decode) -> None:
    """They come out as rows that see nothing, not as what memory held, and are told of."""
    cache = torch.randn(2, 40, 2, 64).to(BF16)
    arguments = {
        "q": torch.randn(5, 4, 64).to(BF16),
        "k_cache": cache,
        "v_cache": cache,
        "seq_lens": torch.tensor([17, 3], dtype=torch.int32),
    }
    take_error(decode)
    out, lse = decode(**arguments, cu_seqlens_q=torch.tensor([first, 3, 4], dtype=torch.int32))
    assert f"decode: cu_seqlens_q[0] is {first}; it must be 0" in take_error(decode)
    before = max(first, 0)
    assert (out[:before] == 0).all() and (lse[:, :before] == -torch.inf).all()
    assert (out[4:] == 0).all() and (lse[:, 4:] == -torch.inf).all()
    arguments["q"] = arguments["q"][before:]
    ends = torch.tensor([0, 3 - before, 4 - before], dtype=torch.int32)
    want, want_lse = decode(**arguments, cu_seqlens_q=ends)
    assert torch.equal(out[before:], want) and torch.equal(lse[:, before:], want_lse)


def test_whole_cache_without_lengths(decode: Decode) -> None:
    case = Case(BF16, lens=(333, 333), heads=8, kv_heads=2)
    inputs = make_inputs(case)
    inputs["k_cache"] = inputs["k_cache"][:, :333]
    inputs["v_cache"] = inputs["v_cache"][:, :333]
    inputs["seq_lens"] = None
    assert_close(case, inputs, *decode(**inputs))


@pytest.mark.parametrize("pad", [8, 1, 2])
def test_strides_are_layout(pad: int, decode: Decode) -> None:
    """K and V in one pool, rows that begin at multiples of 16 bytes (pad 8) and not (pads 1 and 2)."""
    case = Case(F16, lens=(200, 31), heads=4, kv_heads=2, head_dim=64)
    inputs = make_inputs(case)
    tokens = inputs["k_cache"].shape[1]
    pool = torch.full((2, tokens, 2, 4, 64 + pad), torch.nan, dtype=F16)
    views = {**inputs, "k_cache": pool[:, :, 0, ::2, :64], "v_cache": pool[:, :, 1, ::2, pad:]}
    for name in ("k_cache", "v_cache"):
        views[name].copy_(inputs[name])
    assert_close(case, inputs, *decode(**views))


def test_more_than_two_to_the_31_elements_by_strides() -> None:
    load().configure(seed=1)
    stride = 2**32
    storage = torch.empty(stride + 64, dtype=F16)
    k = torch.as_strided(storage, (1, 2, 1, 64), (0, stride, 64, 1))
    k.copy_(torch.randn(1, 2, 1, 64))
    q = torch.randn(1, 1, 1, 64, dtype=F16)
    inputs = {"q": q, "k_cache": k, "v_cache": k, "seq_lens": torch.tensor([2], dtype=torch.int32)}
    assert_close(Case(F16, lens=(2,), heads=1, kv_heads=1, head_dim=64), inputs, *decode_emulated(**inputs))


def test_many_sequences(decode: Decode) -> None:
    lens = torch.randint(0, 40, (4096,)).tolist()
    lens[1234] = 3000
    case = Case(BF16, lens=tuple(lens), heads=2, kv_heads=1, head_dim=8)
    inputs = make_inputs(case)
    out, lse = decode(**inputs, num_ctas=13)
    picked = torch.tensor([0, 1, 1233, 1234, 1235, 4095])
    subset = {name: tensor[picked] for name, tensor in inputs.items()}
    few = dataclasses.replace(case, lens=tuple(lens[i] for i in picked))
    assert_close(few, subset, out[picked], lse[picked])


def take_error(decode: Decode) -> str:
    """What check_errors would raise with; on the emulated device, from its own record."""
    if decode is decode_emulated:
        return load().take_error()
    try:
        lean_attention.check_errors()
    except ValueError as error:
        return str(error)
    return ""


I32 = torch.int32
# What is out of range, what is made of it, and what check_errors says.
OUT_OF_RANGE = [
    (
        {"seq_lens": torch.tensor([9, 2**31 - 1, 7], dtype=I32)},
        {"seq_lens": torch.tensor([9, 96, 7], dtype=I32)},
        "decode: seq_lens[1] is 2147483647; it must be from 0 to 96, the tokens that the cache holds",
    ),
    (
        {"seq_lens": torch.tensor([-5, 20, 7], dtype=I32)},
        {"seq_lens": torch.tensor([0, 20, 7], dtype=I32)},
        "decode: seq_lens[0] is -5; it must be from 0 to 96",
    ),
    (
        {"cache_leftpad": torch.tensor([0, 0, -2], dtype=I32)},
        {},
        "decode: cache_leftpad[2] is -2; it must be at least 0",
    ),
    (
        {"cache_batch_idx": torch.tensor([1, 3, 2], dtype=I32)},
        {"cache_batch_idx": torch.tensor([1, 0, 2], dtype=I32)},
        "decode: cache_batch_idx[1] is 3; it must be from 0 to 2, the slots of the cache",
    ),
    (
        {"block_table": torch.tensor([[0, 5, 1, 2, 3, 4]] * 3, dtype=I32) % 5 - torch.eye(3, 6).int() * 9},
        {"block_table": torch.tensor([[0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4], [0, 0, 0, 2, 3, 4]]).int()},
        "decode: block_table[",
    ),
    (
        {"cu_seqlens_q": torch.tensor([0, 2, 9, 3], dtype=I32)},
        {"cu_seqlens_q": torch.tensor([0, 2, 3, 3], dtype=I32)},
        "decode: cu_seqlens_q[",
    ),
]


@pytest.mark.parametrize(
    ("given", "taken", "message"), OUT_OF_RANGE, ids=[next(iter(given)) for given, _, _ in OUT_OF_RANGE]
)
def test_numbers_out_of_range_are_brought_into_range_and_told_of(
    given: dict, taken: dict, message: str, decode: Decode
) -> None:
    name = next(iter(given))
    arguments = {
        "q": torch.randn(3, 2, 64, dtype=BF16)
        if name == "cu_seqlens_q"
        else torch.randn(3, 1, 2, 64, dtype=BF16),
        "k_cache": torch.randn(
            5 if name == "block_table" else 3, 16 if name == "block_table" else 96, 1, 64
        ).to(BF16),
        "seq_lens": torch.tensor([96, 20, 48], dtype=I32),
    }
    arguments["v_cache"] = arguments["k_cache"].flip(1)
    take_error(decode)
    want = decode(**{**arguments, **taken})
    assert take_error(decode) == ""
    got = decode(**{**arguments, **given})
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert message in take_error(decode)
    assert take_error(decode) == "", "it was told twice"


def test_replays_with_changing_pages() -> None:
    """A captured graph again, with other block tables, lengths, slots of scales and query counts."""
    emulated = load()
    emulated.configure(seed=12, resident_ctas=3)
    case = FeatureCase(
        BF16, torch.int8, "row", "paged", 16, "packed", lens=(200, 33, 90), group=4, dims=(64, 64)
    )
    arguments = make_arguments(case)
    for name in ("k_cache", "v_cache"):
        arguments[name].copy_(torch.randint(-128, 128, arguments[name].shape, dtype=torch.int8))
        arguments[name[0] + "_scale"].uniform_(0.01, 0.02)
    blocks, rows = len(arguments["k_cache"]), len(arguments["q"])
    out, lse = decode_emulated(**arguments)
    for _ in range(20):
        table = arguments["block_table"]
        table.copy_(torch.randint(0, blocks, table.shape, dtype=torch.int32))
        arguments["seq_lens"].copy_(torch.randint(0, 200, (3,), dtype=torch.int32))
        arguments["cu_seqlens_q"][1:] = torch.randint(0, rows + 1, (3,)).sort().values.int()
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        emulated.replay()
        assert_same("replay", arguments, out, lse)
    assert emulated.take_error() == ""


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["k_cache", "v_cache"])
def test_non_finite_values_in_use_propagate(value: float, where: str, decode: Decode) -> None:
    inputs = make_inputs(Case(BF16, lens=(300, 100), heads=4, kv_heads=2, head_dim=64))
    inputs[where][0, 257, 1, 3] = value
    inputs["q"][..., 3].abs_()
    out, lse = decode(**inputs, num_ctas=5)
    want, want_lse = reference.decode(**inputs)
    for got, ref in ((out, want), (lse, want_lse)):
        assert torch.equal(got.isnan(), ref.isnan())
        assert torch.equal(got == torch.inf, ref == torch.inf)
        assert torch.equal(got == -torch.inf, ref == -torch.inf)


def test_errors(decode: Decode) -> None:
    inputs = make_inputs(Case(torch.float32, lens=(64,), head_dim=64))
    with pytest.raises(
        ValueError, match=r"q is torch.float32; on cuda it must be torch.float16 or torch.bfloat16"
    ):
        decode(**inputs)
    small = {name: t[..., :8].half() if t.dim() == 4 else t for name, t in inputs.items()}
    small["k_cache"] = small["v_cache"] = small["k_cache"][:, :1].expand(1, 2**31 - 1, 2, 8)
    with pytest.raises(ValueError, match=r"num_ctas is 16777216; on cuda it must be at most 1048575"):
        decode(**small, num_ctas=2**24)


@pytest.mark.gpu
def test_two_streams_on_a_gpu() -> None:
    cases = [Case(BF16, lens=(9000, 65)), Case(F16, lens=(40, 7000), head_dim=80)]
    inputs = [{name: t.cuda() for name, t in make_inputs(case).items()} for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    want = [lean_attention.decode(**arguments) for arguments in inputs]
    torch.cuda.synchronize()
    for _ in range(200):
        got = []
        for stream, arguments in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(lean_attention.decode(**arguments))
        torch.cuda.synchronize()
        for (out, lse), (want_out, want_lse) in zip(got, want, strict=True):
            assert torch.equal(out, want_out) and torch.equal(lse, want_lse)


@pytest.mark.gpu
def test_a_thousand_graph_replays_on_a_gpu() -> None:
    case = Case(BF16, lens=(6000, 20, 3000), heads=8, kv_heads=2)
    inputs = make_inputs(case)
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.randn(inputs[name].shape, dtype=BF16)
    on_gpu = {name: t.cuda() for name, t in inputs.items()}
    lean_attention.decode(**on_gpu)  # warm: attributes are set outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = lean_attention.decode(**on_gpu)
    for _ in range(1000):
        lens = torch.randint(0, 6001, (3,), dtype=torch.int32)
        on_gpu["seq_lens"].copy_(lens)
        out.fill_(torch.nan)
        graph.replay()
        now = {**inputs, "seq_lens": lens}
        assert_close(dataclasses.replace(case, lens=tuple(lens.tolist())), now, out.cpu(), lse.cpu())


@pytest.mark.gpu
def test_graph_replays_with_changing_pages_on_a_gpu() -> None:
    """Captured once: then other block tables, lengths and contents."""
    blocks, kv_heads, head_dim = 60, 2, 128
    q = torch.randn(3, 1, 8, head_dim, device="cuda", dtype=BF16)
    k_cache, v_cache = torch.randn(2, blocks, 16, kv_heads, head_dim, device="cuda", dtype=BF16)
    seq_lens = torch.full((3,), 300, device="cuda", dtype=torch.int32)
    block_table = torch.zeros(3, 40, device="cuda", dtype=torch.int32)
    lean_attention.decode(q, k_cache, v_cache, seq_lens, block_table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = lean_attention.decode(q, k_cache, v_cache, seq_lens, block_table)
    for _ in range(100):
        block_table.copy_(torch.randint(0, blocks, block_table.shape))
        seq_lens.copy_(torch.randint(0, 641, seq_lens.shape))
        for contents in (q, k_cache, v_cache):
            contents.normal_()
        out.fill_(torch.nan)
        graph.replay()
        arguments = (q, k_cache, v_cache, seq_lens, block_table)
        want, want_lse = reference.decode(*(tensor.cpu() for tensor in arguments))
        torch.testing.assert_close(out.cpu().double(), want, atol=0.02, rtol=0.02)
        torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_reduce_overhead_on_a_gpu() -> None:
    """torch.compile's CUDA graphs around a decode step that writes its caches in place."""

    def step(q, k_new, v_new, k_cache, v_cache, seq_lens):
        lean_attention.append_kv(k_cache, v_cache, k_new, v_new, seq_lens)
        seq_lens += 1
        return lean_attention.decode(q * 2, k_cache, v_cache, seq_lens)[0] + 1

    q = torch.randn(2, 1, 8, 64, device="cuda", dtype=BF16)
    caches = [torch.zeros(2, 100, 2, 64, device="cuda", dtype=BF16) for _ in range(2)]
    other_caches = [cache.clone() for cache in caches]
    seq_lens = torch.tensor([50, 0], device="cuda", dtype=torch.int32)
    other_lens = seq_lens.clone()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(20):
        new = torch.randn(2, 2, 1, 2, 64, device="cuda", dtype=BF16)
        got = compiled(q, *new, *caches, seq_lens).clone()
        want = step(q, *new, *other_caches, other_lens)
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    for cache, other in zip(caches, other_caches, strict=True):
        assert torch.equal(cache, other)
