"""Draws how a batch occupies a grid under stream-K and under the splits that it replaces."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lean_attention.schedule import Schedule


@dataclass(frozen=True)
class Bar:
    """Work of one CTA slot on one sequence, in LeanTiles since the launch."""

    cta: int
    begin: float
    end: float
    sequence: int


@dataclass(frozen=True)
class Panel:
    """One schedule of a batch."""

    bars: list[Bar]
    partials: int  # partial states that are written to memory and merged

    @property
    def makespan(self) -> float:
        """LeanTiles until the last CTA is done."""
        return max(bar.end for bar in self.bars)


def stream_k(schedule: Schedule) -> Panel:
    """Every CTA's lean range."""
    bars, clock = [], [0] * schedule.num_ctas
    segments = schedule.segments()
    for segment in segments:
        begin = clock[segment.cta]
        clock[segment.cta] += segment.end_tile - segment.first_tile
        bars.append(Bar(segment.cta, begin, clock[segment.cta], segment.sequence))
    return Panel(bars, sum(not segment.is_host for segment in segments))


def fixed_split(schedule: Schedule, splits: int) -> Panel:
    """Every output tile cut into the same count of pieces, each given to the slot that is free first.

    One split is FlashAttention-2's grid, over batch and heads only; more are FlashDecoding's.
    """
    free = [(0.0, cta) for cta in range(schedule.num_ctas)]
    bars = []
    for sequence, length in enumerate(schedule.seq_lens):
        tiles = max(1, -(-length // schedule.tile_tokens))
        for _ in range(schedule.num_kv_heads):
            for split in range(splits):
                work = (split + 1) * tiles // splits - split * tiles // splits
                if work:
                    begin, cta = heapq.heappop(free)
                    bars.append(Bar(cta, begin, begin + work, sequence))
                    heapq.heappush(free, (begin + work, cta))
    return Panel(bars, len(bars) if splits > 1 else 0)


def draw_schedules(schedule: Schedule, path: Path, splits: Sequence[int] = (1, 8)) -> dict[str, Panel]:
    """Draws stream-K beside fixed splits of the same batch and returns what it drew, by name.

    A model: every LeanTile takes the same time on every slot, and merging takes none.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = {"LeanAttention (stream-K)": stream_k(schedule)}
    for count in splits:
        name = "FlashAttention-2 (batch x heads)" if count == 1 else f"FlashDecoding ({count} splits)"
        panels[name] = fixed_split(schedule, count)
    longest = max(panel.makespan for panel in panels.values())

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    colour = {s: f"C{s % 10}" for s in range(len(schedule.seq_lens))}
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        axis.barh(
            [bar.cta for bar in panel.bars],
            [bar.end - bar.begin for bar in panel.bars],
            left=[bar.begin for bar in panel.bars],
            height=0.86,
            color=[colour[bar.sequence] for bar in panel.bars],
            edgecolor="white",
            linewidth=0.3,
        )
        busy = schedule.total_tiles / (panel.makespan * schedule.num_ctas)
        numbers = f"{panel.makespan:.0f} LeanTiles long, {busy:.0%} busy, {panel.partials} partial states"
        axis.set_title(f"{name}\n{numbers}", fontsize=9)
        axis.axvline(panel.makespan, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(0, 1.03 * longest)
        axis.set_facecolor("#eeeeee")
        axis.set_xlabel("time (LeanTiles)")
    axes[0].set_ylabel("CTA")
    axes[0].invert_yaxis()
    figure.legend(
        handles=[Patch(color=colour[s], label=f"{n:,}") for s, n in enumerate(schedule.seq_lens)],
        title="tokens",
        loc="outside right center",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return panels
