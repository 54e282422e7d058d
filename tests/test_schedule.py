"""Properties of the stream-K schedule, on random batches, heads, windows and grids."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import groupby, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lean_attention import Schedule
from lean_attention._core import tools
from tests.errors import assert_each_raises

sequences = st.tuples(
    st.one_of(st.integers(0, 40), st.integers(0, 3000)), st.integers(0, 6), st.integers(0, 200)
)


def build(sequences: list[tuple[int, int, int]], ragged: bool, padded: bool, **options) -> Schedule:
    """Sequences of (tokens, query tokens, leftpad); one of them has query tokens."""
    lens, q_lens, pads = map(list, zip(*sequences, strict=True))
    q_lens[0] = max(1, q_lens[0])
    return Schedule(lens, q_len=q_lens if ragged else q_lens[0], leftpad=pads if padded else (), **options)


schedules = st.builds(
    build,
    st.lists(sequences, min_size=1, max_size=12),
    ragged=st.booleans(),
    padded=st.booleans(),
    num_kv_heads=st.integers(1, 5),
    num_ctas=st.one_of(st.integers(1, 20), st.integers(1, 2000)),
    group=st.integers(1, 9),
    tile_tokens=st.sampled_from([1, 16, 64, 128]),
    rows_per_block=st.sampled_from([1, 4, 16, 64]),
    window_left=st.integers(-1, 300),
    window_right=st.integers(-1, 3),
)


def q_len(s: Schedule, sequence: int) -> int:
    return s.q_len if isinstance(s.q_len, int) else s.q_len[sequence]


def visible_tokens(s: Schedule, sequence: int, row: int) -> set[int]:
    """Written from the words of the definition, token by token."""
    length = s.seq_lens[sequence]
    position = length - q_len(s, sequence) + row // s.group
    return {
        token
        for token in range(s.leftpad[sequence] if s.leftpad else 0, length)
        if (s.window_left < 0 or token >= position - s.window_left)
        and (s.window_right < 0 or token <= position + s.window_right)
    }


def output_tiles(s: Schedule) -> list[tuple[int, int, int]]:
    return [
        (b, head, block)
        for b in range(len(s.seq_lens))
        for head in range(s.num_kv_heads)
        for block in range(-(-s.group * q_len(s, b) // s.rows_per_block))
    ]


@settings(max_examples=500, deadline=None)
@given(schedules)
def test_every_lean_tile_is_taken_exactly_once(s: Schedule) -> None:
    segments = s.segments()
    by_output = [(key, list(group)) for key, group in groupby(segments, key=lambda x: x.output_tile)]
    # Output tiles come in order, each once, and none is left out: an empty sequence has an owner too.
    assert [key for key, _ in by_output] == output_tiles(s)
    for _, pieces in by_output:
        assert pieces[0].first_tile == 0
        for a, b in pairwise(pieces):
            assert (b.first_tile, b.first_token) == (a.end_tile, a.end_token)
            assert b.cta > a.cta
    assert sum(x.end_tile - x.first_tile for x in segments) == s.total_tiles


@settings(max_examples=500, deadline=None)
@given(schedules)
def test_ranges_are_equal_shares(s: Schedule) -> None:
    ranges = [s.lean_range(cta) for cta in range(s.num_ctas)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == s.total_tiles
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    sizes = [end - begin for begin, end in ranges]
    assert max(sizes) - min(sizes) <= 1
    taken = dict.fromkeys(range(s.num_ctas), 0)
    for segment in s.segments():
        taken[segment.cta] += segment.end_tile - segment.first_tile
    assert [taken[cta] for cta in range(s.num_ctas)] == sizes


@settings(max_examples=500, deadline=None)
@given(schedules)
def test_one_host_per_output_and_one_partial_per_cta(s: Schedule) -> None:
    for _, group in groupby(s.segments(), key=lambda x: x.output_tile):
        pieces = list(group)
        assert [piece.is_host for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        # The peers are the CTAs right after the host, so that it finds them without being told.
        assert [piece.cta for piece in pieces] == list(range(pieces[0].host, pieces[0].last_peer + 1))
    for _, group in groupby(s.segments(), key=lambda x: x.cta):
        published = [not piece.is_host for piece in group]
        assert not any(published[1:]), "only the first segment of a range may be a partial"


@settings(max_examples=500, deadline=None)
@given(schedules)
def test_tiles_cover_what_rows_see_and_no_more(s: Schedule) -> None:
    for (b, _, block), group in groupby(s.segments(), key=lambda x: x.output_tile):
        read = {t for piece in group for t in range(piece.first_token, piece.end_token)}
        rows = range(block * s.rows_per_block, min((block + 1) * s.rows_per_block, s.group * q_len(s, b)))
        seen = set().union(*(visible_tokens(s, b, row) for row in rows))
        assert seen <= read
        # No token outside the span of what is seen: tiles outside a window are not in the schedule.
        assert not read or (seen and min(read) == min(seen) and max(read) == max(seen)) or not seen


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 2**62), st.integers(1, 10**6), st.data())
def test_a_tile_finds_its_cta_past_two_to_the_31(total: int, num_ctas: int, data: st.DataObject) -> None:
    cta = data.draw(st.integers(0, num_ctas - 1))
    begin, end = tools.lean_range(cta, num_ctas, total)
    assert end - begin in (total // num_ctas, -(-total // num_ctas))
    if begin < end:
        assert tools.cta_of(begin, num_ctas, total) == cta
        assert tools.cta_of(end - 1, num_ctas, total) == cta


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(st.integers(1, 50), st.integers(1, 10**6), st.integers(1, 2**50)),
    st.integers(1, 64),
    st.integers(1, 1000),
    st.data(),
)
def test_threads_of_unequal_speed_end_together(
    total: int, threads: int, least: int, data: st.DataObject
) -> None:
    """Where a thread is up to twice as fast as another, none works longer than all would with every LeanTile
    shared out, and one short range."""
    threads = min(threads, total)
    begins, _ = tools.guided_ranges(total, threads, least, [])
    ranges = list(pairwise(begins))
    ends = [tile for begin, end in ranges for tile in (begin, end - 1)]
    _, found = tools.guided_ranges(total, threads, least, ends)
    assert found == [cta for cta in range(len(ranges)) for _ in range(2)]
    assert ranges[0][0] == 0 and ranges[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    sizes = [end - begin for begin, end in reversed(ranges)]  # as they are handed out
    assert min(sizes) > 0 and len(sizes) >= threads
    if threads == 1 or total < 2 * threads * least:
        assert len(sizes) == threads and max(sizes) - min(sizes) <= 1
        return
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert min(sizes[:-1]) >= least and least <= 2 * sizes[-1] < 3 * least
    speeds = [data.draw(st.integers(100, 200)) for _ in range(threads)]
    free = [(0.0, speed) for speed in speeds]
    for size in sizes:
        end, speed = heappop(free)
        heappush(free, (end + size / speed, speed))
    longest = max(end for end, _ in free)
    assert longest <= total / sum(speeds) + 1.5 * least / min(speeds) + 1


def test_huge_batch_by_arithmetic() -> None:
    """2^36 tokens in one sequence and 2^31 - 1 in others: more LeanTiles than 32 bits hold."""
    s = Schedule([2**36, 5, 2**31 - 1, 0], num_kv_heads=128, num_ctas=132, tile_tokens=1)
    assert s.total_tiles == 128 * (2**36 + 5 + 2**31 - 1 + 1)
    last = s.segments(first_cta=131)[-1]
    assert last.output_tile == (3, 127, 0)
    assert s.lean_range(131)[1] == s.total_tiles


def test_reads_like_a_sentence() -> None:
    text = str(Schedule([300, 0], num_kv_heads=1, num_ctas=2, tile_tokens=100))
    assert text.splitlines() == [
        "4 LeanTiles of 100 tokens over 2 CTAs",
        "CTA 0: sequence 0, KV head 0, row block 0: LeanTiles 0..1 (tokens 0..199), host, merges CTAs 1..1",
        "CTA 1: sequence 0, KV head 0, row block 0: LeanTiles 2..2 (tokens 200..299), peer of CTA 0",
        "CTA 1: sequence 1, KV head 0, row block 0: nothing to read, host",
    ]


def test_bad_arguments_are_named() -> None:
    def schedule(arguments: dict) -> None:
        Schedule(**{"seq_lens": [1], "num_kv_heads": 1, "num_ctas": 1, **arguments})

    cases = [
        ({"num_ctas": 0}, "num_ctas is 0"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"seq_lens": [3, -1]}, r"seq_lens\[1\] is -1"),
        ({"tile_tokens": -5}, "tile_tokens is -5"),
        ({"q_len": 0}, "q_len is 0"),
        ({"q_len": [1, 2]}, "q_len has 2 entries, seq_lens 1"),
        ({"leftpad": [-2]}, r"leftpad\[0\] is -2"),
        ({"shared": [(0, 1, 0)]}, r"shared\[0\] has 3 numbers"),
        ({"shared": [(0, 1, 0, 2**40)]}, "shared has 1099511627776; it must fit 32 bits"),
        ({"shared": [(0, 1, 0, 7)]}, r"shared\[0\] ends with token 7"),
    ]
    assert_each_raises(ValueError, "Schedule", schedule, cases)
