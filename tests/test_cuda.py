"""What only CUDA has: kernels, launches, graphs, streams, interleavings, errors that are told of later."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from torch import Tensor

import lean_attention
from lean_attention import reference
from tests.backends import Backend, only
from tests.cases import BF16, F16, F32, INT8, Case, assert_close, make_inputs
from tests.emulation import load

on_cuda = only("emulated", "cuda")


def decode_emulated(**arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.lean_attn_emulated.decode(**arguments)


@on_cuda
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_kernel(head_dim: int, backend: Backend) -> None:
    for dtype, rows in itertools.product((F16, BF16), (1, 16, 17, 40)):
        case = Case(dtype, lens=(333, 15), heads=rows, kv_heads=1, head_dim=head_dim, num_ctas=3)
        inputs = make_inputs(case)
        assert_close(case, inputs, *backend.decode(**inputs))


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


@on_cuda
@pytest.mark.parametrize("first", [2, -1])
def test_packed_queries_before_the_first_sequence(first: int, backend: Backend) -> None:
    """They come out as rows that see nothing, not as what memory held, and are told of."""
    cache = torch.randn(2, 40, 2, 64).to(BF16)
    arguments = {
        "q": torch.randn(5, 4, 64).to(BF16),
        "k_cache": cache,
        "v_cache": cache,
        "seq_lens": torch.tensor([17, 3], dtype=torch.int32),
    }
    backend.take_error()
    out, lse = backend.decode(**arguments, cu_seqlens_q=torch.tensor([first, 3, 4], dtype=torch.int32))
    assert f"decode: cu_seqlens_q[0] is {first}; it must be 0" in backend.take_error()
    before = max(first, 0)
    assert (out[:before] == 0).all() and (lse[:, :before] == -torch.inf).all()
    assert (out[4:] == 0).all() and (lse[:, 4:] == -torch.inf).all()
    arguments["q"] = arguments["q"][before:]
    ends = torch.tensor([0, 3 - before, 4 - before], dtype=torch.int32)
    want, want_lse = backend.decode(**arguments, cu_seqlens_q=ends)
    assert torch.equal(out[before:], want) and torch.equal(lse[:, before:], want_lse)


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


@on_cuda
@pytest.mark.parametrize(
    ("given", "taken", "message"), OUT_OF_RANGE, ids=[next(iter(given)) for given, _, _ in OUT_OF_RANGE]
)
def test_numbers_out_of_range_are_brought_into_range_and_told_of(
    given: dict, taken: dict, message: str, backend: Backend
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
    backend.take_error()
    want = backend.decode(**{**arguments, **taken})
    assert backend.take_error() == ""
    got = backend.decode(**{**arguments, **given})
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert message in backend.take_error()
    assert backend.take_error() == "", "it was told twice"


def test_replays_with_changing_pages() -> None:
    """A captured graph again, with other block tables, lengths, slots of scales and query counts."""
    emulated = load()
    emulated.configure(seed=12, resident_ctas=3)
    case = Case(
        BF16, (200, 33, 90), 8, head_dim=64, q_len="packed", quantised=INT8, scales="row", layout="paged"
    )
    arguments = make_inputs(case)
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
        assert_close("replay", arguments, out, lse)
    assert emulated.take_error() == ""


@on_cuda
@pytest.mark.parametrize("head_dim", [128, 256])
def test_more_peers_than_a_host_block_merges_at_a_time(backend: Backend, head_dim: int) -> None:
    """It holds the states of 32; rows of 256 dims are written in more than one go."""
    tiles = 70
    tokens = tiles * (128 if head_dim == 128 else 64)
    case = Case(BF16, lens=(tokens,), heads=4, kv_heads=1, head_dim=head_dim, q_len=3)
    inputs = make_inputs(case)
    for num_ctas in (tiles, 34, 33, 2):
        assert_close(f"{case}, {num_ctas} CTAs", inputs, *backend.decode(**inputs, num_ctas=num_ctas))


@on_cuda
def test_errors(backend: Backend) -> None:
    inputs = make_inputs(Case(F32, lens=(64,), head_dim=64))
    with pytest.raises(
        ValueError, match=r"q is torch.float32; on cuda it must be torch.float16 or torch.bfloat16"
    ):
        backend.decode(**inputs)
    small = {name: t[..., :8].half() if t.dim() == 4 else t for name, t in inputs.items()}
    small["k_cache"] = small["v_cache"] = small["k_cache"][:, :1].expand(1, 2**30, 2, 8)
    with pytest.raises(ValueError, match=r"num_ctas is 16777216; on cuda it must be at most 1048575"):
        backend.decode(**small, num_ctas=2**24)


@on_cuda
def test_calls_that_32_bits_cannot_count(backend: Backend) -> None:
    """By their shapes: sequences are empty, and caches are one token that all others share."""

    def decode(tokens: int, batch: int = 1, kv_heads: int = 1) -> None:
        cache = torch.zeros(1, 1, 1, 8, dtype=BF16).expand(batch, tokens, kv_heads, 8)
        q, seq_lens = torch.zeros(batch, 1, kv_heads, 8, dtype=BF16), torch.zeros(batch, dtype=torch.int32)
        backend.decode(q=q, k_cache=cache, v_cache=cache, seq_lens=seq_lens)

    decode(2**30)
    with pytest.raises(ValueError, match=r"a sequence may have 1073741825 tokens; on cuda .* 1073741824$"):
        decode(2**30 + 1)
    tiles = (
        r"the batch may have 2147483648 LeanTiles, 1 query rows .* on cuda each may be at most 2147483647$"
    )
    with pytest.raises(ValueError, match=tiles):
        decode(2**30, batch=128, kv_heads=4)


def test_the_largest_numbers_of_a_launch() -> None:
    emulated = load()
    most = 2**31 - 1
    rows = {"group": 2, "query_tokens": (most - 16) // 2}
    emulated.windows(capacity=2**30, most_tiles=most, **rows)
    with pytest.raises(ValueError, match="may have 2147483648 LeanTiles, 1 query rows per KV head; on cuda"):
        emulated.windows(most_tiles=most + 1)
    with pytest.raises(ValueError, match="may have 1 LeanTiles, 2147483632 query rows per KV head; on cuda"):
        emulated.windows(group=2, query_tokens=(most - 16) // 2 + 1)


@on_cuda
def test_windows_larger_than_any_cache(backend: Backend) -> None:
    inputs = make_inputs(Case(BF16, lens=(300, 17), q_len=3, causal=False))
    want = backend.decode(**inputs)
    for tokens in (2**30, 2**31 + 5, 2**40):
        for name in ("window_left", "window_right"):
            got = backend.decode(**inputs, **{name: tokens})
            assert all(map(torch.equal, got, want)), f"{name}={tokens}"


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
    """Each gives what an eager call gives, bit for bit, and every hundredth what the definition says."""
    case = Case(BF16, lens=(6000, 20, 3000), heads=8, kv_heads=2)
    inputs = make_inputs(case)
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.randn(inputs[name].shape, dtype=BF16)
    on_gpu = {name: t.cuda() for name, t in inputs.items()}
    lean_attention.decode(**on_gpu)  # warm: attributes are set outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = lean_attention.decode(**on_gpu)
    for replay in range(1000):
        lens = torch.randint(0, 6001, (3,), dtype=torch.int32)
        on_gpu["seq_lens"].copy_(lens)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        want, want_lse = lean_attention.decode(**on_gpu)
        assert torch.equal(out, want) and torch.equal(lse, want_lse), f"replay {replay}, lengths {lens}"
        if replay % 100 == 0:
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
