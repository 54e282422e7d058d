"""What a call with little context costs beside its arithmetic, on a CPU.

    python -m benchmarks.small_calls

One sequence of 128 tokens, 4 KV heads and head_dim 128, in the processor's caches. On one thread the time of
128 tokens less that of 64 is half the arithmetic; the rest of a call is what comes with it: the dispatcher,
checks, the schedule, packing queries, writing outputs. All threads would share the arithmetic equally.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.harness import OUTPUTS, Case, Contender, Inputs, commit, machine_facts
from benchmarks.peers import LeanAttention, Sdpa
from benchmarks.report import print_machine, print_whole, processor, table_of, write_text

TOKENS, KV_HEADS, HEAD_DIM = 128, 4, 128  # at most 512 KB, which fit L2
CASES = [(dtype, group) for dtype in (torch.bfloat16, torch.float16, torch.float32) for group in (1, 4, 8)]


def call_of(contender: Contender, dtype: torch.dtype, group: int, tokens: int) -> Callable[[], Tensor]:
    case = Case(dtype, (tokens,), group * KV_HEADS, KV_HEADS, HEAD_DIM)
    return contender.prepare(case, Inputs.random(case))


def microseconds(calls: list[Callable[[], Tensor]], seconds: float) -> list[float]:
    """Median time of each call, measured in turns of a few calls each, which keep its memory cached."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[-1]) < 5 or time.perf_counter() < end:
        for call, mine in zip(calls, times, strict=True):
            call()
            begin = time.perf_counter()
            for _ in range(5):
                call()
            mine.append((time.perf_counter() - begin) / 5 * 1e6)
    return [statistics.median(mine) for mine in times]


def measure(dtype: torch.dtype, group: int, seconds: float) -> dict[str, float]:
    threads = torch.get_num_threads()
    half, whole = (call_of(LeanAttention(), dtype, group, tokens) for tokens in (TOKENS // 2, TOKENS))
    torch.set_num_threads(1)
    try:
        half_us, one_thread_us = microseconds([half, whole], seconds)
    finally:
        torch.set_num_threads(threads)
    all_threads_us, sdpa_us = microseconds([whole, call_of(Sdpa(), dtype, group, TOKENS)], seconds)
    arithmetic = 2 * (one_thread_us - half_us)
    return {
        "arithmetic_us": arithmetic,
        "one_thread_us": one_thread_us,
        "one_thread_more_us": one_thread_us - arithmetic,
        "all_threads_us": all_threads_us,
        "all_threads_more_us": all_threads_us - arithmetic / threads,
        "sdpa_us": sdpa_us,
    }


def print_study(study: dict, console: Console) -> None:
    """A row a case; "more" is what a call takes beside its arithmetic."""
    facts = study["machine"]
    print_machine(facts, console)
    table = table_of(
        f"{processor(facts)}: microseconds for {study['tokens']} tokens",
        "query heads per KV head",
        ("arithmetic", "1 thread", "more", f"{facts['threads']} threads", "more", "torch's SDPA"),
    )
    for name, result in study["cases"].items():
        table.add_row(name, *(f"{us:.1f}" for us in result.values()))
    print_whole(table, console)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each case (default 2)")
    parser.add_argument("--output", type=Path, default=OUTPUTS / "small_calls.json")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds} is not positive")
    console = Console()
    study: dict = {"machine": machine_facts(), "commit": commit(), "tokens": TOKENS, "cases": {}}
    with torch.inference_mode():
        for dtype, group in track(CASES, "measuring", console=console):
            name = f"{str(dtype).removeprefix('torch.')}, {group}"
            study["cases"][name] = measure(dtype, group, options.seconds / 2)

    print_study(study, console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(study, indent=1) + "\n")
    tables = options.output.with_suffix(".txt")
    write_text(print_study, study, tables)
    console.print(f"written: {options.output}, {tables}", soft_wrap=True)


if __name__ == "__main__":
    main()
