"""The pictures of schedules: all work and all merging, when it is done, and by whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest

from lean_attention import Schedule
from lean_attention._core import tools
from lean_attention.tools.picture import Panel, fixed_split, stream_k


def test_the_picture_shows_all_the_work() -> None:
    schedule = Schedule([1000, 70, 0, 5000], num_kv_heads=3, num_ctas=7)
    for panel in (stream_k(schedule), fixed_split(schedule, 1), fixed_split(schedule, 4)):
        assert sum(bar.end - bar.begin for bar in panel.bars) == schedule.total_tiles
        for cta in range(7):
            bars = [bar for bar in panel.bars if bar.cta == cta]
            assert all(a.end <= b.begin for a, b in itertools.pairwise(bars))


@pytest.mark.parametrize(
    "panel_of", [stream_k, partial(fixed_split, splits=4)], ids=["stream_k", "fixed_split"]
)
@pytest.mark.parametrize("lens", [[1000, 70, 0, 5000], [65536], [1] * 9], ids=["ragged", "one", "tiny"])
def test_the_picture_shows_all_merging(lens: list[int], panel_of: Callable[..., Panel]) -> None:
    schedule = Schedule(lens, num_kv_heads=3, num_ctas=7)
    panel = panel_of(schedule, merge_tiles=0.25)
    assert sum(bar.end - bar.begin for bar in panel.merges) == 0.25 * panel.partials
    assert not panel_of(schedule).merges
    for cta in range(7):  # a CTA computes or merges, not both at once
        bars = sorted((bar.begin, bar.end) for bar in (*panel.bars, *panel.merges) if bar.cta == cta)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(bars))
    if panel_of is not stream_k and panel.merges:  # the second kernel
        assert min(bar.begin for bar in panel.merges) == max(bar.end for bar in panel.bars)


def test_the_picture_shows_shared_prefixes() -> None:
    """Read once. Whoever merges sequences has no work left when they are done, where prefixes are long."""
    rows = [(0, 8, 0, 9000), (0, 4, 9000, 20000), (4, 8, 9000, 15000)]
    schedule = Schedule([20100] * 8, 2, num_ctas=60, group=4, rows_per_block=16, tile_tokens=100, shared=rows)
    panel = stream_k(schedule, merge_tiles=0.25)
    assert sum(bar.end - bar.begin for bar in panel.bars) == schedule.total_tiles
    of_row = {row: sum(b.end - b.begin for b in panel.bars if b.sequence == row - 3) for row in range(3)}
    assert of_row == {0: 2 * 2 * 90, 1: 2 * 110, 2: 2 * 60}  # KV heads, row blocks, LeanTiles
    assert len(panel.merges) == panel.partials >= 2 * (2 + 1 + 1)  # row blocks of nodes
    assert panel.makespan < 1.6 * schedule.total_tiles / schedule.num_ctas
    for cta in range(schedule.num_ctas):
        bars = sorted((bar.begin, bar.end) for bar in (*panel.bars, *panel.merges) if bar.cta == cta)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(bars))


def test_makespans() -> None:
    def splits(tiles: list[int], num_ctas: int) -> dict[int, float]:
        lens = [count * tools.lean_tile_tokens(128) for count in tiles]
        schedule = Schedule(lens, 1, num_ctas=num_ctas, head_dim=128)
        lean = stream_k(schedule).makespan
        return {0: lean} | {count: fixed_split(schedule, count).makespan for count in (1, 2, 6)}

    # Two output tiles on three CTAs: halves leave one CTA with two of four pieces.
    assert splits([6, 6], 3) == {0: 4, 1: 6, 2: 6, 6: 4}
    # One long output tile last: whoever gets it works on alone.
    assert splits([1, 1, 1, 1, 8], 4)[1] == 9
