"""What reading a shared prefix once saves: decode with `shared`, without it, and in three calls.

    python -m benchmarks.shared_prefixes

The three calls are what can be had without it: the prefix with all sequences' rows as its query tokens, the
rest of each sequence, and merge_states. The floor is the larger of the time to read K and V once and the time
for the products, both at the rates that a plain call reaches in the same rounds: the read-only kernel's, and
decode's with 128 query rows over a cache that stays in L2.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import lean_attention
from benchmarks.report import print_whole, table_of
from lean_attention.schedule import Schedule
from lean_attention.tools.command_line import positive
from lean_attention.tools.picture import draw_schedules

KV_HEADS, GROUP, HEAD_DIM, PAGE = 8, 4, 128, 64
HEADS = KV_HEADS * GROUP


@dataclass(frozen=True)
class Sharing:
    """Sequences in `branches` equal parts: `prefix` tokens of all, `middle` of each part, `own` of each."""

    sequences: int
    prefix: int
    own: int
    branches: int = 1
    middle: int = 0

    def __str__(self) -> str:
        text = f"{self.sequences} x {self.prefix:,} + {self.own:,}"
        return f"{text}, {self.branches} parts + {self.middle:,}" if self.middle else text

    @property
    def length(self) -> int:
        return self.prefix + self.middle + self.own

    @property
    def rows(self) -> list[tuple[int, int, int, int]]:
        rows = [(0, self.sequences, 0, self.prefix)]
        each = self.sequences // self.branches
        if self.middle:
            ends = (self.prefix, self.prefix + self.middle)
            rows += [(i * each, (i + 1) * each, *ends) for i in range(self.branches)]
        return rows

    @property
    def tokens_read(self) -> int:
        return self.prefix + self.branches * self.middle + self.sequences * self.own

    def table(self) -> Tensor:
        """The block table, whose pages are in order of first use."""
        parts = [self.prefix // PAGE, self.middle // PAGE, self.own // PAGE]
        each = self.sequences // self.branches
        table = torch.empty(self.sequences, sum(parts), dtype=torch.int32)
        for b in range(self.sequences):
            middle = parts[0] + b // each * parts[1]
            own = parts[0] + self.branches * parts[1] + b * parts[2]
            starts = (0, middle, own)
            pages = [torch.arange(start, start + n) for start, n in zip(starts, parts, strict=True)]
            table[b] = torch.cat(pages)
        return table


def calls_of(case: Sharing) -> dict[str, Callable[[], Tensor]]:
    table = case.table()
    pages = [
        torch.randn(int(table.max()) + 1, KV_HEADS, PAGE, HEAD_DIM, dtype=torch.bfloat16).transpose(1, 2)
        for _ in "kv"
    ]
    q = torch.randn(case.sequences, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    lens = torch.full((case.sequences,), case.length, dtype=torch.int32)
    shared = torch.tensor(case.rows, dtype=torch.int32)
    rest = table[:, case.prefix // PAGE :].contiguous()
    prefix_len = torch.tensor([case.prefix], dtype=torch.int32)
    q_of_all = q.view(1, case.sequences, HEADS, HEAD_DIM)

    def three_calls() -> Tensor:
        out, lse = lean_attention.decode(q_of_all, *pages, prefix_len, table[:1], causal=False)
        own, own_lse = lean_attention.decode(q, *pages, lens - case.prefix, rest)
        lses = [lse[0].t().reshape(case.sequences, HEADS, 1).contiguous(), own_lse]
        return lean_attention.merge_states([out.view_as(own), own], lses)[0]

    def decode(**options: Tensor) -> Tensor:
        return lean_attention.decode(q, *pages, lens, table, **options)[0]

    return {"plain": decode, "shared": lambda: decode(shared=shared), "three calls": three_calls}


def rate_of_products() -> Callable[[], float]:
    """A call that returns decode's products a second with 128 query rows per KV head, over K and V in L2."""
    rows, tokens, repeats = 128, 1024, 32
    q = torch.randn(1, 1, rows, HEAD_DIM, dtype=torch.bfloat16)
    page = torch.randn(1, tokens, 1, HEAD_DIM, dtype=torch.bfloat16)
    table = torch.zeros(1, repeats, dtype=torch.int32)

    def call() -> float:
        begin = time.perf_counter()
        lean_attention.decode(q, page, page, None, table)
        return rows * tokens * repeats * 2 * HEAD_DIM / (time.perf_counter() - begin)

    return call


def read_bandwidth() -> Callable[[], float]:
    """A call that returns the bytes a second that decode reads without its arithmetic."""
    cache = torch.randn(1, KV_HEADS, 16384, HEAD_DIM, dtype=torch.bfloat16).transpose(1, 2)
    q = torch.randn(1, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16)

    def call() -> float:
        begin = time.perf_counter()
        torch.ops.lean_attn.read_only(q, cache, cache)
        return 2 * cache.numel() * 2 / (time.perf_counter() - begin)

    return call


def measure(case: Sharing, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of each call, and the floor."""
    calls = calls_of(case)
    outs = {name: call() for name, call in calls.items()}
    for name, out in outs.items():
        torch.testing.assert_close(out, outs["plain"], rtol=0.05, atol=0.02, msg=f"{name} is wrong")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    products, bandwidth = rate_of_products(), read_bandwidth()
    rates = []
    for _ in range(rounds):
        rates.append((products(), bandwidth()))
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    product_rate, read_rate = (statistics.median(rate) for rate in zip(*rates, strict=True))
    bytes_read = case.tokens_read * KV_HEADS * 2 * HEAD_DIM * 2
    floor = max(bytes_read / read_rate, case.sequences * case.length * HEADS * 2 * HEAD_DIM / product_rate)
    return {name: statistics.median(each) for name, each in seconds.items()}, floor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=positive, default=16384, metavar="N", help="tokens (default: 16384)")
    parser.add_argument("--own", type=positive, default=512, metavar="N", help="tokens (default: 512)")
    parser.add_argument(
        "--picture", type=Path, metavar="PATH", help="PNG of the last case's schedule, on 264 CTAs"
    )
    parser.add_argument("--rounds", type=positive, default=9, metavar="N", help="calls of each (default: 9)")
    options = parser.parse_args(arguments)
    prefix, own = (max(n // (2 * PAGE), 1) * 2 * PAGE for n in (options.prefix, options.own))
    cases = [Sharing(n, prefix, own) for n in (1, 8, 32)]
    cases.append(Sharing(32, prefix // 2, own, branches=4, middle=prefix // 2))
    table = table_of(
        f"milliseconds, bf16, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, pages of {PAGE}, "
        f"{torch.get_num_threads()} threads",
        "sequences x shared + own tokens",
        ("plain", "shared", "three calls", "of plain", "of three", "floor", "of floor"),
    )
    with torch.inference_mode():
        for case in cases:
            seconds, floor = measure(case, options.rounds)
            plain, shared, three = seconds.values()
            table.add_row(
                str(case),
                *(f"{1e3 * each:.2f}" for each in (plain, shared, three)),
                f"{shared / plain:.2f}",
                f"{shared / three:.2f}",
                f"{1e3 * floor:.2f}",
                f"{shared / floor:.2f}",
            )
    print_whole(table, Console())
    if options.picture:
        case = cases[-1]
        schedule = Schedule(
            [case.length] * case.sequences,
            KV_HEADS,
            num_ctas=264,
            group=GROUP,
            head_dim=HEAD_DIM,
            rows_per_block=16,
            shared=case.rows,
        )
        draw_schedules(schedule, options.picture)
        print(f"picture of the schedule of {case}: {options.picture.resolve()}")


if __name__ == "__main__":
    main()
