"""A step over several processes of this machine, and a model of several GPUs.

    python -m benchmarks.distributed
    python -m benchmarks.distributed --model

The processes have as many threads in all as one has, and share its memory bandwidth. So they show what the
exchange costs, not what more devices gain. Bytes are those that a rank receives, counted at the collectives.
"K and V" is what gathering the shards in place of the states receives, and how long it takes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from benchmarks.report import print_whole, table_of
from lean_attention import distributed
from lean_attention.distributed import exchange as exchanges
from lean_attention.distributed.exchange import gather, received, row_words
from lean_attention.tools.command_line import positive

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 256
KV_BYTES = 2 * KV_HEADS * HEAD_DIM * 2  # of a token, in bfloat16
# Of a row of a partial state, and of the result.
WORDS, MERGED_WORDS = row_words(HEAD_DIM, torch.float32), row_words(HEAD_DIM, torch.bfloat16)


class CountBytes:
    """The bytes that this rank receives in the exchanges of steps: counted where they are called."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> CountBytes:
        self._collectives, exchanges._collectives = exchanges._collectives, self
        return self

    def __exit__(self, *_error) -> None:
        exchanges._collectives = self._collectives

    def all_gather_into_tensor(self, tensor: Tensor, ranks: int, group: str) -> Tensor:
        self.received += (ranks - 1) * tensor.nbytes
        return self._collectives.all_gather_into_tensor(tensor, ranks, group)

    def all_to_all_single(self, tensor: Tensor, output: list[int], splits: list[int], group: str) -> Tensor:
        self.received += tensor.nbytes - tensor.nbytes // len(splits)
        return self._collectives.all_to_all_single(tensor, output, splits, group)

    def wait_tensor(self, tensor: Tensor) -> Tensor:
        return self._collectives.wait_tensor(tensor)


@dataclass(frozen=True)
class Batch:
    sequences: int
    tokens: int  # of each

    def __str__(self) -> str:
        return f"{self.sequences} x {self.tokens:,}"

    @property
    def kv_bytes(self) -> int:
        return self.sequences * self.tokens * KV_BYTES


Way = tuple[Batch, str, int]  # exchange, parts


@dataclass(frozen=True)
class Measured:
    step: float
    attention: float  # the longest rank's, of it
    received: int
    gathering: float  # of K and V
    gathered: int


def measure(rank: int, ranks: int, batch: Batch, way: str, parts: int, rounds: int) -> Measured:
    shards = distributed.RoundRobin(BLOCK)
    lens = torch.full((batch.sequences,), batch.tokens, dtype=torch.int32)
    local_lens = shards.local_lens(lens, rank, ranks)
    capacity = int(shards.local_lens(lens, 0, ranks)[0])
    k, v = (
        torch.randn(batch.sequences, capacity, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2)
    )
    q = torch.randn(batch.sequences, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16)

    def step() -> None:
        distributed.decode(q, k, v, local_lens, shards=shards, exchange=way, parts=parts)

    def attention() -> None:
        torch.ops.lean_attn.decode(q, k, v, local_lens, out_dtype=torch.float32)

    def gather_caches() -> None:
        for shard in (k, v):
            gather(shard, dist.group.WORLD)

    def seconds(call: Callable[[], None], count: int) -> float:
        """Median over rounds of the last rank's time."""
        call()
        times = torch.empty(count, dtype=torch.float64)
        for i in range(count):
            dist.barrier()
            begin = time.perf_counter()
            call()
            times[i] = time.perf_counter() - begin
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return statistics.median(times.tolist())

    with CountBytes() as of_step:
        step()
    with CountBytes() as of_caches:
        gather_caches()
    return Measured(
        seconds(step, rounds),
        seconds(attention, rounds),
        of_step.received,
        seconds(gather_caches, 1),
        of_caches.received,
    )


def run_rank(rank: int, ranks: int, threads: int, store: str, cases: list[Way], rounds: int, results) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    with torch.inference_mode():
        measured = [measure(rank, ranks, *case, rounds) for case in cases]
    if rank == 0:
        results.put(measured)
    dist.destroy_process_group()


def run(ranks: int, threads: int, cases: list[Way], rounds: int) -> list[Measured]:
    context = multiprocessing.get_context("forkserver")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, threads, os.path.join(folder, "store"), cases, rounds, results)
        processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"a process of {ranks} has failed")
    return results.get()


def print_measured(options: argparse.Namespace, console: Console) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    threads = torch.get_num_threads()
    batches = [Batch(1, options.context), Batch(16, max(options.context // 16, 1))]
    table = table_of(
        f"bf16, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, round-robin blocks of {BLOCK} tokens, gloo",
        "sequences x tokens",
        (
            "processes x threads",
            "exchange",
            "step ms",
            "attention ms",
            "bytes",
            "K and V ms",
            "K and V bytes",
        ),
    )
    for ranks in options.ranks:
        each = max(threads // ranks, 1)
        cases: list[Way] = [(batch, "gather", 1) for batch in batches]
        if ranks > 1:
            cases += [(batch, "rows", 1) for batch in batches if batch.sequences * HEADS % ranks == 0]
            cases += [(batch, "gather", 2) for batch in batches if batch.sequences > 1]
            cases.sort(key=lambda case: case[0].sequences)
        for (batch, exchange, parts), found in zip(
            cases, run(ranks, each, cases, options.rounds), strict=True
        ):
            table.add_row(
                str(batch),
                f"{ranks} x {each}",
                (exchange + ", 2 parts" * (parts > 1)) if ranks > 1 else "-",
                f"{1e3 * found.step:.2f}",
                f"{1e3 * found.attention:.2f}",
                f"{found.received:,}",
                f"{1e3 * found.gathering:.1f}" if ranks > 1 else "-",
                f"{found.gathered:,}",
            )
    print_whole(table, console)
    for ranks in options.ranks:
        if ranks > threads:
            console.print(
                f"{threads} cores are too few for {ranks} processes: they take turns", highlight=False
            )


@dataclass(frozen=True)
class Link:
    """What the model takes for a collective of small messages: ``base + hop * log2(ranks)``, and a rate."""

    name: str
    bytes_per_second: float
    base: float
    hop: float

    def __str__(self) -> str:
        return (
            f"{self.name} {self.bytes_per_second / 1e9:.0f} GB/s a GPU, a collective "
            f"{1e6 * self.base:.0f} us + {1e6 * self.hop:.0f} us * log2(ranks)"
        )


GPU_READS, GPU_LAUNCH = 4.8e12 * 0.9, 6e-6
LINKS = [Link("NVLink", 450e9, 8e-6, 2e-6), Link("Ethernet", 50e9, 15e-6, 8e-6)]
MODELLED = [Batch(1, 2**17), Batch(1, 2**20), Batch(64, 2**17)]


def model(batch: Batch, ranks: int, link: Link) -> tuple[float, str]:
    """Seconds of one layer's step, and the faster exchange."""
    reading = GPU_LAUNCH + batch.kv_bytes / ranks / GPU_READS
    if ranks == 1:
        return reading, "-"
    latency = link.base + link.hop * math.log2(ranks)
    rows, times = batch.sequences * HEADS, {}
    for exchange, collectives in (("gather", 1), ("rows", 2)):
        if exchange == "gather" or rows % ranks == 0:
            moved = received(rows, WORDS, MERGED_WORDS, ranks, exchange)
            times[exchange] = reading + collectives * latency + moved / link.bytes_per_second
    fastest = min(times, key=times.get)
    return times[fastest], fastest


def print_model(console: Console) -> None:
    console.print(
        f"A model, not a measurement: one layer's step, bf16, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, states "
        f"in float32; each GPU reads {GPU_READS / 1e12:.2f} TB/s after {1e6 * GPU_LAUNCH:.0f} us;",
        soft_wrap=True,
        highlight=False,
    )
    console.print("; ".join(map(str, LINKS)), soft_wrap=True, highlight=False)
    columns = [column for link in LINKS for column in (f"{link.name} us", "times", "exchange")]
    for batch in MODELLED:
        table = table_of(f"{batch} tokens: microseconds, and times as fast as one GPU", "GPUs", columns)
        one, _ = model(batch, 1, LINKS[0])
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            cells = []
            for link in LINKS:
                seconds, exchange = model(batch, ranks, link)
                cells += [f"{1e6 * seconds:,.0f}", f"{one / seconds:.1f}", exchange]
            table.add_row(str(ranks), *cells)
        print_whole(table, console)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="the model of 2 to 64 GPUs instead")
    parser.add_argument(
        "--context", type=positive, default=65536, metavar="N", help="tokens (default: 65536)"
    )
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument(
        "--rounds", type=positive, default=15, metavar="N", help="calls of each (default: 15)"
    )
    options = parser.parse_args(arguments)
    console = Console()
    if options.model:
        print_model(console)
    else:
        print_measured(options, console)


if __name__ == "__main__":
    main()
