"""`python -m lean_attention demo`: is it right, how fast is it, and what does the schedule look like?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import lean_attention
from lean_attention import reference
from lean_attention.schedule import Schedule
from lean_attention.tools.picture import MERGE_TILES, best_split, draw_schedules, fixed_split
from lean_attention.tools.roofline import read_bandwidth

RAGGED = (64, 41, 23, 14, 9, 5, 2, 0.5)  # shares of the longest sequence, in 64ths


NOTES = """\
GB/s: K and V in use over time. of bw: share of the read bandwidth; it can pass 100 %
where the last-level cache holds K and V. SDPA: scaled_dot_product_attention, sequence
by sequence. error: largest difference from float64."""


@dataclass(frozen=True)
class DemoShape:
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Row:
    lens: list[int]
    seconds: float
    sdpa_seconds: float
    error: float
    sdpa_error: float


def available_memory() -> int:
    """Bytes that can be had without swapping (Linux); a cautious guess elsewhere."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 2**32


def longest_length(shape: DemoShape, limit: int) -> int:
    """The longest sequence, at most `limit` tokens, whose ragged batch takes a quarter of the free memory."""
    tokens = available_memory() // 4 // shape.bytes_per_token * 64 // int(sum(RAGGED))
    return max(64, min(limit, tokens))


def median_seconds(function: Callable[[], object], budget: float = 1.5) -> float:
    """Median time of a call, over as many calls as the budget (seconds) allows, from 3 to 50."""
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < budget and len(seconds) < 50):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


def sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, lens: list[int]) -> Tensor:
    """PyTorch's attention, one sequence after another so that it reads no padding."""
    outs = []
    for b, length in enumerate(lens):
        k, v = (cache[b : b + 1, :length].transpose(1, 2) for cache in (k_cache, v_cache))
        outs.append(F.scaled_dot_product_attention(q[b : b + 1].transpose(1, 2), k, v, enable_gqa=True))
    return torch.cat(outs).transpose(1, 2)


def largest_errors(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, outs: list[Tensor]
) -> list[float]:
    """Largest absolute error of each output against float64, one KV head at a time to bound memory."""
    group = q.shape[2] // k_cache.shape[2]
    errors = [0.0] * len(outs)
    for head in range(k_cache.shape[2]):
        rows = slice(head * group, (head + 1) * group)
        kv = (cache[:, :, head : head + 1] for cache in (k_cache, v_cache))
        want, _ = reference.decode(q[:, :, rows], *kv, seq_lens)
        for i, out in enumerate(outs):
            errors[i] = max(errors[i], (out[:, :, rows].double() - want).abs().max().item())
    return errors


def measure(shape: DemoShape, lens: list[int], cache: tuple[Tensor, Tensor]) -> Row:
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    q = torch.randn(len(lens), 1, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    k_cache, v_cache = (part[: len(lens), : max(lens)] for part in cache)
    out, _ = lean_attention.decode(q, k_cache, v_cache, seq_lens)
    sdpa_out = sdpa(q, k_cache, v_cache, lens)
    error, sdpa_error = largest_errors(q, k_cache, v_cache, seq_lens, [out, sdpa_out])
    return Row(
        lens,
        median_seconds(lambda: lean_attention.decode(q, k_cache, v_cache, seq_lens)),
        median_seconds(lambda: sdpa(q, k_cache, v_cache, lens)),
        error,
        sdpa_error,
    )


def lengths_text(lens: list[int]) -> str:
    if len(lens) == 1:
        return f"{lens[0]:,}"
    return f"{len(lens)} from {min(lens):,} to {max(lens):,}"


def table(shape: DemoShape, rows: list[Row], bandwidth: float) -> Table:
    result = Table(
        title=f"{str(shape.dtype).removeprefix('torch.')}, {shape.num_heads} query heads, "
        f"{shape.num_kv_heads} KV heads, head_dim {shape.head_dim}\n"
        f"read bandwidth of this machine: {bandwidth / 1e9:.1f} GB/s on {torch.get_num_threads()} threads"
    )
    result.add_column("tokens")
    for column in ("ms", "GB/s", "of bw", "SDPA ms", "faster", "error", "SDPA's"):
        result.add_column(column, justify="right")
    for row in rows:
        rate = sum(row.lens) * shape.bytes_per_token / row.seconds
        result.add_row(
            lengths_text(row.lens),
            f"{1e3 * row.seconds:.2f}",
            f"{rate / 1e9:.1f}",
            f"{rate / bandwidth:.0%}",
            f"{1e3 * row.sdpa_seconds:.1f}",
            f"{row.sdpa_seconds / row.seconds:.1f}x",
            f"{row.error:.0e}",
            f"{row.sdpa_error:.0e}",
        )
    return result


def run(shape: DemoShape, max_tokens: int, num_ctas: int, picture: Path, context: int) -> None:
    """Runs the demo and prints its tables.

    `picture` is where the schedule is drawn (PNG), `context` the prompt of the generation in tokens.
    """
    console = Console()
    longest = longest_length(shape, max_tokens)
    ragged = [max(1, int(longest * share / 64)) for share in RAGGED]
    batches = [[length] for length in ragged[::-2]] + [ragged]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        steps = progress.add_task("filling the KV caches", total=len(batches) + 2)
        # Heads before tokens, as most models store them; the op takes the transposed view.
        cache = tuple(
            torch.empty(len(ragged), shape.num_kv_heads, longest, shape.head_dim, dtype=shape.dtype)
            for _ in range(2)
        )
        # Random numbers take longer than all that is measured: sequences have the last tokens of the longest.
        source = ragged.index(longest)
        for part in cache:
            part[source].normal_()
            for b, length in enumerate(ragged):
                part[b, :, :length] = part[source, :, longest - length :]
        cache = tuple(part.transpose(1, 2) for part in cache)
        progress.update(steps, advance=1, description="measuring the memory's read bandwidth")
        bandwidth = read_bandwidth(min(2**29, available_memory() // 8 // 64 * 64))
        rows = []
        for lens in batches:
            progress.update(steps, advance=1, description=f"decoding {sum(lens):,} tokens")
            rows.append(measure(shape, lens, cache))
        progress.update(steps, advance=1)
    console.print(table(shape, rows, bandwidth))
    console.print(NOTES, soft_wrap=True)
    draw(Schedule(ragged, shape.num_kv_heads, num_ctas, head_dim=shape.head_dim), picture, console)
    generate(context, console)


NEW_TOKENS = 48


def generate(context: int, console: Console) -> None:
    """A small Llama goes on from a text, with transformers' attention and cache and with this package's."""
    try:
        from lean_attention.integrations import transformers  # noqa: F401
    except ImportError as error:
        console.print(f"no generation: {error}", soft_wrap=True)
        return
    from lean_attention.tools.generation import compare, contenders, prompt_bytes, random_llama
    from lean_attention.tools.text_demo import generation_table

    with console.status("a Llama reads") as status:
        results = compare(
            random_llama(), prompt_bytes(context), NEW_TOKENS, contenders("auto"), status.update
        )
    console.print(
        generation_table(
            f"a Llama of 28 million random weights, float32, {context:,} bytes of text as its prompt:\n"
            f"{NEW_TOKENS} tokens, greedy",
            results,
        )
    )
    console.print("a real model and longer contexts: make demo DEMO_ARGS=--text")


def draw(schedule: Schedule, picture: Path, console: Console) -> None:
    panels = draw_schedules(schedule, picture)
    best = best_split(schedule)
    panels[f"FlashDecoding ({best} splits, best)"] = fixed_split(schedule, best, MERGE_TILES)
    result = Table(title=f"the ragged batch on a grid of {schedule.num_ctas} CTAs (a model, not measured)")
    result.add_column("schedule")
    for column in ("LeanTiles long", "busy", "partial states"):
        result.add_column(column, justify="right")
    for name, panel in panels.items():
        busy = schedule.total_tiles / (panel.makespan * schedule.num_ctas)
        result.add_row(name, f"{panel.makespan:g}", f"{busy:.0%}", f"{panel.partials}")
    console.print(result)
    console.print(
        f"Merging a partial state counts as {MERGE_TILES} LeanTiles. best: of 2 to 64 splits, by hindsight."
    )
    console.print(f"picture of the schedule: {picture.resolve()}", soft_wrap=True)
