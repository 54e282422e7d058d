"""Draws how a batch occupies a grid under stream-K and under the splits that it replaces."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lean_attention.schedule import Schedule, Segment

# What merging one partial state takes in the picture, in LeanTiles: an assumption, for all schedules alike.
MERGE_TILES = 0.25
MOST_NAMED = 16  # sequences in the legend


@dataclass(frozen=True)
class Bar:
    """Work of one CTA slot on a sequence, in LeanTiles since the launch; row i of n of `shared` is i - n."""

    cta: int
    begin: float
    end: float
    sequence: int


@dataclass(frozen=True)
class Panel:
    """One schedule of a batch."""

    bars: list[Bar]
    partials: int  # partial states that are written to memory and merged
    merges: list[Bar]  # empty where merging takes no time

    @property
    def makespan(self) -> float:
        """LeanTiles until the last CTA is done."""
        return max(bar.end for bar in (*self.bars, *self.merges))


def in_order(segments: Iterable[Segment]) -> list[Segment]:
    """A CTA's segments as it takes them: what it publishes, sequences, rows of `shared`, children first."""
    first, *others = segments
    published, hosted = ([], [first, *others]) if first.is_host else ([first], others)
    nodes = [segment for segment in hosted if segment.shared >= 0]
    return [*published, *(segment for segment in hosted if segment.shared < 0), *reversed(nodes)]


def stream_k(schedule: Schedule, merge_tiles: float = 0.0) -> Panel:
    """Every CTA's lean range. A host block merges its peers when they have published, in the same kernel;
    that of a row of `shared` then also what its sequences, and the rows within it, have left.

    Args:
        merge_tiles: how long merging one partial state takes, in LeanTiles.
    """
    bars, merges, partials = [], [], 0
    published: dict[int, float] = {}  # by CTA
    left: dict[
        tuple[int, int], list[float]
    ] = {}  # by row of `shared` and KV head: when states are left to it
    ranges = itertools.groupby(schedule.segments(), lambda segment: segment.cta)
    for cta, segments in reversed([(cta, in_order(segments)) for cta, segments in ranges]):
        now = 0.0  # whom a CTA waits for comes after it, and is drawn already
        for segment in segments:
            end = now + segment.end_tile - segment.first_tile
            bars.append(Bar(cta, now, end, segment.sequence))
            now = end
            if not segment.is_host:
                published[cta] = now
                continue
            ready = [published[peer] for peer in range(segment.host + 1, segment.last_peer + 1)]
            if segment.shared >= 0:  # of many sequences' rows, one state for each of its own
                ready.append(max(left[segment.shared, segment.kv_head]))
            partials += len(ready)
            for state in ready if merge_tiles else ():
                begin, now = max(now, state), max(now, state) + merge_tiles
                merges.append(Bar(cta, begin, now, segment.sequence))
            if segment.into >= 0:
                left.setdefault((segment.into, segment.kv_head), []).append(now)
    return Panel(bars, partials, merges)


def fixed_split(schedule: Schedule, splits: int, merge_tiles: float = 0.0) -> Panel:
    """Every output tile cut into the same count of pieces, each given to the slot that is free first.

    Prefixes that sequences share are read for each of them.

    One split is FlashAttention-2's grid, over batch and heads only; more are FlashDecoding's. A second kernel
    merges their partial states, one CTA for each output tile; it begins when the last piece is done.
    """
    free = [(0.0, cta) for cta in range(schedule.num_ctas)]
    bars: list[Bar] = []
    pieces: list[tuple[int, int]] = []  # of each output tile: its sequence, how many partial states
    for sequence, length in enumerate(schedule.seq_lens):
        tiles = max(1, -(-length // schedule.tile_tokens))
        for _ in range(schedule.num_kv_heads):
            before = len(bars)
            for split in range(splits):
                work = (split + 1) * tiles // splits - split * tiles // splits
                if work:
                    begin, cta = heapq.heappop(free)
                    bars.append(Bar(cta, begin, begin + work, sequence))
                    heapq.heappush(free, (begin + work, cta))
            pieces.append((sequence, len(bars) - before))
    merges = []
    if splits > 1 and merge_tiles:
        launch = max(bar.end for bar in bars)
        free = [(launch, cta) for cta in range(schedule.num_ctas)]
        for sequence, count in pieces:
            begin, cta = heapq.heappop(free)
            merges.append(Bar(cta, begin, begin + count * merge_tiles, sequence))
            heapq.heappush(free, (merges[-1].end, cta))
    return Panel(bars, len(bars) if splits > 1 else 0, merges)


def splits_that_fill(schedule: Schedule) -> int:
    """The most pieces per output tile that the grid holds at once, but two at least."""
    output_tiles = max(1, len(schedule.seq_lens) * schedule.num_kv_heads)
    return max(2, schedule.num_ctas // output_tiles)


def best_split(schedule: Schedule) -> int:
    """The power of two up to 64 that is fastest for this batch, which only hindsight tells."""
    return min((2**i for i in range(1, 7)), key=lambda n: fixed_split(schedule, n, MERGE_TILES).makespan)


def draw_schedules(schedule: Schedule, path: Path) -> dict[str, Panel]:
    """Draws stream-K beside two fixed splits of the same batch and returns what it drew, by name.

    The splits are FlashAttention-2's, by batch and KV head alone, and FlashDecoding's into as many pieces as
    fill the grid. A model: every LeanTile takes the same time on every slot.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    splits = splits_that_fill(schedule)
    panels = {
        "LeanAttention (stream-K)": stream_k(schedule, MERGE_TILES),
        f"FlashDecoding ({splits} splits)": fixed_split(schedule, splits, MERGE_TILES),
        "FlashAttention-2 (batch x heads)": fixed_split(schedule, 1, MERGE_TILES),
    }
    # The slowest panel is cut off where the second one ends, or the others would be too small to see.
    end = 1.1 * sorted(panel.makespan for panel in panels.values())[1]

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    rows = len(schedule.shared)
    colour = {s: f"C{s % 10}" for s in range(len(schedule.seq_lens))}
    colour |= {i - rows: str(0.35 + 0.15 * (i % 3)) for i in range(rows)}  # greys

    # White gaps tell the CTAs of small grids apart; in large ones they would hide the bars.
    small = schedule.num_ctas <= 64
    line = {"edgecolor": "white", "linewidth": 0.3} if small else {"linewidth": 0}
    height = 0.86 if small else 1.0

    def rectangles(bars: Sequence[Bar]) -> list[Rectangle]:
        return [Rectangle((bar.begin, bar.cta - height / 2), bar.end - bar.begin, height) for bar in bars]

    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        bars = PatchCollection(
            rectangles(panel.bars), facecolor=[colour[bar.sequence] for bar in panel.bars], **line
        )
        axis.add_collection(bars)
        axis.add_collection(PatchCollection(rectangles(panel.merges), facecolor="black", linewidth=0))
        busy = schedule.total_tiles / (panel.makespan * schedule.num_ctas)
        numbers = f"{panel.makespan:g} LeanTiles long, {busy:.0%} busy, {panel.partials} partial states"
        axis.set_title(f"{name}\n{numbers}", fontsize=9)
        if panel.makespan <= end:
            axis.axvline(panel.makespan, color="black", linewidth=0.8, linestyle=":")
        else:
            axis.text(
                0.97, 0.5, f"goes on to {panel.makespan:g} \u2192", transform=axis.transAxes, ha="right"
            )
        axis.set_xlim(0, end)
        axis.set_facecolor("#eeeeee")
        axis.set_xlabel("time (LeanTiles)")
    axes[0].set_ylim(schedule.num_ctas, -1)
    axes[0].set_ylabel("CTA")
    figure.legend(
        handles=[
            *(Patch(color=colour[s], label=f"{n:,}") for s, n in enumerate(schedule.seq_lens[:MOST_NAMED])),
            *(
                Patch(color="none", label=f"and {n} more")
                for n in [len(schedule.seq_lens) - MOST_NAMED]
                if n > 0
            ),
            *(
                Patch(color=colour[i - rows], label=f"shared: {begin:,}..{end - 1:,}")
                for i, (_, _, begin, end) in enumerate(schedule.shared)
                if end > begin
            ),
            Patch(color="black", label="merging"),
        ],
        title="tokens",
        loc="outside right center",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return panels
