"""How fast decode reads K and V on a GPU, beside what the GPU reads and copies at, and beside others."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lean_attention
from benchmarks.gpu_model import predicted_share

# Calls take turns on so many bytes of caches, which no L2 holds.
ROTATED_BYTES = 256 * 10**6
# Calls in a graph, at least: what a replay costs is then nothing beside them.
CALLS = 20
FLOOR_BYTES = 2**32
CASE_SECONDS = 4  # that a case may take


@dataclass(frozen=True)
class Case:
    """One decode step in bf16, of sequences with these lengths (tokens)."""

    name: str
    lens: tuple[int, ...]
    page_size: int = 0  # 0: contiguous caches
    layout: str = "heads_first"  # HND; or tokens_first, NHD
    e4m3: bool = False  # the caches
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.e4m3 else torch.bfloat16

    @property
    def kv_bytes(self) -> int:
        """Of K and V in use."""
        return 2 * sum(self.lens) * self.kv_heads * self.head_dim * self.cache_dtype.itemsize

    def inputs(self, device: str) -> dict[str, Tensor]:
        """Arguments of decode. Pages lie in random order."""
        batch, longest = len(self.lens), max(self.lens)
        blocks, block_size = batch, longest
        found: dict[str, Tensor] = {}
        if self.page_size:
            block_size, pages = self.page_size, -(-longest // self.page_size)
            table = torch.zeros(batch, pages, dtype=torch.int32)
            used = torch.arange(pages) * self.page_size < torch.tensor(self.lens)[:, None]
            blocks = int(used.sum())
            table[used] = torch.randperm(blocks).int()
            found["block_table"] = table.to(device)
        shape = (blocks, self.kv_heads, block_size, self.head_dim)
        if self.layout == "tokens_first":
            shape = (blocks, block_size, self.kv_heads, self.head_dim)
        for name in ("k_cache", "v_cache"):
            cache = torch.randn(shape, dtype=torch.bfloat16, device=device).to(self.cache_dtype)
            found[name] = cache if self.layout == "tokens_first" else cache.transpose(1, 2)
        found["q"] = torch.randn(batch, 1, self.heads, self.head_dim, dtype=torch.bfloat16, device=device)
        found["seq_lens"] = torch.tensor(self.lens, dtype=torch.int32, device=device)
        return found


K = 1024
# Pages are tokens-first, as serving engines have them.
CASES = (
    Case("1 x 8k", (8 * K,)),
    Case("1 x 128k", (128 * K,)),
    Case("32 x 4k", (4 * K,) * 32),
    Case("1 x 1k", (K,)),
    Case("31 x 1k and 64k", (64 * K, *(K,) * 31)),
    Case("32 x 4k, pages of 16", (4 * K,) * 32, 16, "tokens_first"),
    Case("1 x 128k, e4m3", (128 * K,), e4m3=True),
    Case("32 x 4k, tokens-first", (4 * K,) * 32, layout="tokens_first"),
    Case("32 x 4k, pages of 64", (4 * K,) * 32, 64, "tokens_first"),
    Case("1 x 128k, pages of 16", (128 * K,), 16, "tokens_first"),
    Case("32 x 4k, e4m3", (4 * K,) * 32, e4m3=True),
)

Call = Callable[[], object]


class Unavailable(Exception):
    """Why a contender cannot do a case."""


def ours(case: Case, inputs: dict[str, Tensor]) -> Call:
    return lambda: lean_attention.decode(**inputs)


def flash_attention(case: Case, inputs: dict[str, Tensor]) -> Call:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise Unavailable(f"not importable: {error}") from error
    if case.e4m3 or case.page_size:
        raise Unavailable("is measured with bf16 caches without pages")
    q, k, v, lens = (inputs[name] for name in ("q", "k_cache", "v_cache", "seq_lens"))
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lens)


def flashinfer(case: Case, inputs: dict[str, Tensor]) -> Call:
    """A contiguous cache is a page per sequence."""
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable(f"not importable: {error}") from error
    q, k, v = (inputs[name] for name in ("q", "k_cache", "v_cache"))
    if case.layout == "heads_first":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    page_size = case.page_size or max(case.lens)
    counts = [-(-length // page_size) for length in case.lens]
    last = [length - (count - 1) * page_size for length, count in zip(case.lens, counts, strict=True)]
    table = inputs["block_table"].cpu() if case.page_size else torch.arange(len(case.lens))[:, None]
    indices = torch.cat([row[:count] for row, count in zip(table, counts, strict=True)])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device),
        "HND" if case.layout == "heads_first" else "NHD",
        use_tensor_cores=True,
    )
    wrapper.plan(
        *(numbers.int().to(q.device) for numbers in (offsets, indices, torch.tensor(last))),
        case.heads, case.kv_heads, case.head_dim, page_size, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q[:, 0], (k, v))


PEERS = {"FlashAttention": flash_attention, "FlashInfer": flashinfer}


def graph_microseconds(calls: list[Call], replays: int = 10) -> float:
    """Median GPU time of a call, where each takes its turn in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    turns = len(calls) * math.ceil(CALLS / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            calls[turn % len(calls)]()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / turns)
    return statistics.median(times)


def host_microseconds(calls: list[Call], repeats: int = 200) -> float:
    """What a call keeps the host busy, by itself."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for turn in range(repeats):
        calls[turn % len(calls)]()
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken / repeats * 1e6


def floors() -> dict[str, float]:
    """GB/s that the GPU reads and copies at."""
    data = torch.ones(FLOOR_BYTES // 4, dtype=torch.float32, device="cuda")
    other = torch.empty_like(data)
    read = graph_microseconds([data.sum])
    copy = graph_microseconds([lambda: other.copy_(data)])
    return {"read": data.nbytes / read / 1e3, "copy": 2 * data.nbytes / copy / 1e3}


def measure(case: Case, contender: Callable[[Case, dict], Call]) -> dict:
    copies = math.ceil(ROTATED_BYTES / case.kv_bytes)
    calls = [contender(case, case.inputs("cuda")) for _ in range(copies)]
    taken = graph_microseconds(calls)
    return {
        "microseconds": round(taken, 2),
        "gb_per_second": round(case.kv_bytes / taken / 1e3, 1),
        "host_microseconds": round(host_microseconds(calls), 2),
    }


@torch.no_grad()
def bandwidth(keep: Callable[..., None], end: float) -> None:
    """First ours in all cases, then the others, until time.monotonic() is `end`."""
    floor = floors()
    keep(**{f"{name}_gb_per_second": round(value, 1) for name, value in floor.items()})
    print(f"the GPU reads at {floor['read']:.0f} GB/s and copies at {floor['copy']:.0f} GB/s")
    print(f"{'':16}{'case':26}{'us':>9}{'GB/s':>8}{'share':>7}{'model':>7}{'host us':>9}")
    for contender, prepare in {"lean_attention": ours, **PEERS}.items():
        for case in CASES:
            keep(**result_of(contender, prepare, case, floor["read"], end))
            torch.cuda.empty_cache()


def result_of(
    contender: str, prepare: Callable[[Case, dict], Call], case: Case, read: float, end: float
) -> dict:
    """What is measured of a case, or why it is not; prints its line of the table."""
    row: dict = {"contender": contender, "case": case.name, "kv_bytes": case.kv_bytes}
    try:
        if time.monotonic() > end - CASE_SECONDS:
            raise Unavailable("no time was left")
        row |= measure(case, prepare)
    except Unavailable as error:
        return {**row, "left_out": str(error)}
    except Exception as error:  # out of memory, or what others raise: the next case may run
        row["failed"] = f"{type(error).__name__}: {error}"
        print(f"{contender:16}{case.name:26}{row['failed']}")
        return row
    row["share_of_read"] = round(row["gb_per_second"] / read, 3)
    row["predicted_share"] = predicted_share(case.name) if contender == "lean_attention" else None
    print(line_of(row))
    return row


def line_of(row: dict) -> str:
    """Of the table: what was predicted beside what was measured."""
    predicted = "" if row["predicted_share"] is None else f"{row['predicted_share']:.2f}"
    return (
        f"{row['contender']:16}{row['case']:26}{row['microseconds']:9.1f}{row['gb_per_second']:8.0f}"
        f"{row['share_of_read']:7.2f}{predicted:>7}{row['host_microseconds']:9.1f}"
    )
