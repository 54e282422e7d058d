"""What does each feature cost on a CPU? Every one against the plain call, on caches of 16k tokens.

    python -m benchmarks.features

Parameters are such that results stay those of the plain call (slopes of 0, sinks of -inf), so that outputs
can be compared; the kernels do not know that. In the table, 1.05x means that the feature takes 5 % longer;
plain-again is the plain call on memory of its own, as each feature has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import lean_attention
from benchmarks.harness import OUTPUTS, Case, Inputs, run_study
from benchmarks.peers import LeanAttention
from benchmarks.report import draw, print_tables, write_text

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case(BF16, (16384,), 32, 8, 128),
    Case(BF16, (16384,), 8, 8, 128),
    Case(BF16, (16384,), 32, 8, 128, "tokens_first"),
    Case(F16, (16384,), 32, 8, 128),
    Case(F32, (16384,), 32, 8, 128),
]


class Feature:
    """The plain call with something changed. Caches are copies, so that all read memory of their own."""

    def __init__(self, name: str, change: Callable[[Case, dict], dict]) -> None:
        self.name = name
        self._change = change

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        plain = {
            "q": inputs.q,
            "k_cache": inputs.k_cache.clone(),
            "v_cache": inputs.v_cache.clone(),
            "seq_lens": inputs.seq_lens,
        }
        arguments = {**plain, **self._change(case, plain)}
        return lambda: lean_attention.decode(**arguments)[0]


def paged(block_size: int) -> Feature:
    """Shuffled pages in the case's layout: heads first (HND) is [blocks, heads, block, dim]."""

    def change(case: Case, plain: dict) -> dict:
        blocks = case.lens[0] // block_size
        order = torch.randperm(blocks)
        changed: dict = {"block_table": order.argsort().int()[None]}
        for name in ("k_cache", "v_cache"):
            pages = plain[name].reshape(blocks, block_size, case.kv_heads, case.head_dim)[order]
            if case.layout == "heads_first":
                pages = pages.transpose(1, 2).contiguous().transpose(1, 2)
            changed[name] = pages
        return changed

    return Feature(f"page-{block_size}", change)


def quantised(dtype: torch.dtype, per_row: bool) -> Feature:
    def change(case: Case, plain: dict) -> dict:
        changed: dict = {}
        for name in ("k_cache", "v_cache"):
            scale = 1.0
            values = plain[name].float()
            if dtype == torch.int8:
                scale = 6.0 / 127
                values = (values / scale).round().clamp(-127, 127)
            changed[name] = values.to(dtype)
            scales = torch.tensor(scale)
            if per_row and case.layout == "heads_first":
                scales = torch.full((1, case.kv_heads, case.lens[0]), scale).transpose(1, 2)
            elif per_row:
                scales = torch.full((1, case.lens[0], case.kv_heads), scale)
            changed[name[0] + "_scale"] = scales
        return changed

    name = str(dtype).removeprefix("torch.").removeprefix("float8_").removesuffix("fn")
    return Feature(name + ("-row" if per_row else ""), change)


FEATURES = [
    Feature("plain-again", lambda case, plain: {}),  # how far two copies of the same differ
    *(paged(block_size) for block_size in (1, 16, 64, 256)),
    Feature("softcap", lambda case, plain: {"softcap": 1e4}),
    Feature("alibi", lambda case, plain: {"alibi_slopes": torch.zeros(case.heads)}),
    Feature("sinks", lambda case, plain: {"sinks": torch.full((case.heads,), -torch.inf)}),
    Feature("leftpad", lambda case, plain: {"cache_leftpad": torch.zeros(1, dtype=torch.int32)}),
    Feature("slots", lambda case, plain: {"cache_batch_idx": torch.zeros(1, dtype=torch.int32)}),
    quantised(torch.float8_e4m3fn, False),
    quantised(torch.float8_e5m2, False),
    quantised(torch.int8, False),
    quantised(torch.int8, True),
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="time for each feature of a case (default 1)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUTS / "features.json")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds} is not positive")
    console = Console()
    # Several copies of each cache, or the luck of one copy's place in memory would count for the feature.
    study = run_study(
        CASES, [LeanAttention(), *FEATURES], options.output, seconds=options.seconds, least_sets=4
    )
    print_tables(study, console)
    picture, tables = options.output.with_suffix(".png"), options.output.with_suffix(".txt")
    draw(study, picture)
    write_text(print_tables, study, tables)
    console.print(f"written: {options.output}, {tables}, {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
