"""Prefixes that sequences share: read once, and the same result as without `shared`."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lean_attention
from lean_attention import Schedule
from tests.cases import BF16, DTYPES, F32, INT8, QUANTISED, Case, assert_close, make_inputs

Row = tuple[int, int, int, int]


def ints(*rows: Row) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)


@st.composite
def forests(draw: st.DrawFn, limits: list[int]) -> list[Row]:
    """Rows over sequences of which the first `limits[b]` tokens may be shared."""

    def below(first: int, end: int, begin: int, depth: int) -> list[Row]:
        rows: list[Row] = []
        while depth > 0 and first < end:
            stop = draw(st.integers(first + 1, end), label="end sequence")
            most = min(limits[first:stop])
            if most > begin and draw(st.booleans(), label="is shared"):
                token = draw(st.integers(begin + 1, most), label="end token")
                rows += [(first, stop, begin, token), *below(first, stop, token, depth - 1)]
            first = stop
        return rows

    rows = below(0, len(limits), 0, depth=3)
    for _ in range(draw(st.integers(0, 2), label="empty rows")):
        rows.insert(draw(st.integers(0, len(rows))), (0, 0, 0, 0))
    return rows


@st.composite
def shared_cases(draw: st.DrawFn) -> tuple[Case, list[Row]]:
    lens = tuple(draw(st.lists(st.integers(1, 400), min_size=1, max_size=6), label="lens"))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4, 11]))
    layout = draw(st.sampled_from(["tokens_first", "heads_first", "slots", "paged", "paged_heads_first"]))
    quantised = draw(st.sampled_from([None, None, *QUANTISED]))
    q_len = draw(st.sampled_from([1, 1, 3]))
    case = Case(
        draw(st.sampled_from(DTYPES)),
        lens,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 80, 128])),
        q_len=q_len,
        quantised=quantised,
        scales="" if quantised is None else draw(st.sampled_from(["scalar", "head", "row"])),
        layout=layout,
        block_size=draw(st.sampled_from([1, 16, 48])),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        sinks=draw(st.booleans()),
        num_ctas=draw(st.sampled_from([0, 1, 2, 5, 40])),
    )
    limits = [n - (q_len - 1 if case.causal else 0) for n in lens]
    return case, draw(forests(limits))


def hide_copies(inputs: dict, rows: list[Row]) -> None:
    """Makes NaN of what all sequences but the first of a row have of its tokens, in contiguous caches."""
    slots = inputs.get("cache_batch_idx")
    slot = (lambda b: b) if slots is None else (lambda b: int(slots[b]))
    for name in ("k_cache", "v_cache"):
        whole = inputs[name].clone()
        for first, end, begin, stop in rows:
            for b in range(first + 1, end):
                inputs[name][slot(b), begin:stop] = torch.nan
        for first, _, begin, stop in rows:
            inputs[name][slot(first), begin:stop] = whole[slot(first), begin:stop]


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(shared_cases())
def test_any_forest(instruction_set: str, drawn: tuple[Case, list[Row]]) -> None:
    case, rows = drawn
    inputs = make_inputs(case)
    if case.quantised is None and "block_table" not in inputs:
        hide_copies(inputs, rows)
    inputs["shared"] = ints(*rows)
    assert_close(case, inputs, *lean_attention.decode(**inputs))


def test_packed_queries() -> None:
    """Counts of their own, one of them none: that sequence's tokens are read by no one."""
    case = Case(BF16, (120, 90, 200, 77), q_len="packed")
    inputs = make_inputs(case)
    least = min(n - count + 1 for n, count in zip(case.lens[2:], case.query_counts[2:], strict=True))
    inputs["shared"] = ints((0, 4, 0, 40), (2, 4, 40, least))
    assert_close(case, inputs, *lean_attention.decode(**inputs))


def samples(batch: int = 6, shared: int = 200, own: int = 30, heads: int = 8) -> dict:
    """Contiguous caches of sequences that begin with the same tokens."""
    cache = torch.randn(2, 1, shared + own, 2, 64).to(BF16).repeat(1, batch, 1, 1, 1)
    cache[:, :, shared:] = torch.randn(2, batch, own, 2, 64)
    return {
        "q": torch.randn(batch, 1, heads, 64).to(BF16),
        "k_cache": cache[0],
        "v_cache": cache[1],
        "seq_lens": torch.full((batch,), shared + own, dtype=torch.int32),
    }


def test_results_repeat_bitwise() -> None:
    inputs = samples()
    rows = ints((0, 6, 0, 100), (0, 3, 100, 200), (3, 6, 100, 150))
    for num_ctas in (0, 1, 3, 8):
        calls = [lean_attention.decode(**inputs, shared=rows, num_ctas=num_ctas) for _ in range(5)]
        for out, lse in calls[1:]:
            assert torch.equal(out, calls[0][0]) and torch.equal(lse, calls[0][1])


def test_empty_rows_are_the_plain_call() -> None:
    inputs = samples()
    want = lean_attention.decode(**inputs)
    for rows in (ints(), ints(*[(0, 0, 0, 0)] * 3)):
        got = lean_attention.decode(**inputs, shared=rows)
        assert all(map(torch.equal, got, want))


def test_into_given_outputs_and_compiled() -> None:
    inputs = samples()
    rows = ints((0, 6, 0, 200))
    want = lean_attention.decode(**inputs, shared=rows)
    out = torch.empty_like(want[0])
    lean_attention.decode(**inputs, shared=rows, out=out)
    assert torch.equal(out, want[0])
    compiled = torch.compile(lean_attention.decode, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(**inputs, shared=rows), want))
    names = ("q", "k_cache", "v_cache", "seq_lens")
    arguments = (*(inputs[name] for name in names), *[None] * 9, rows)
    torch.library.opcheck(torch.ops.lean_attn.decode.default, arguments)


SEES = "the tokens that all query tokens of sequence {} see"
BAD_ROWS = {
    "shared[0] has sequences 0 to 7; they must be one or more, from 0 to 6, the batch size of q": [
        (0, 7, 0, 9)
    ],
    "shared[1] has sequences 3 to 3; they must be one or more, from 0 to 6, the batch size of q": [
        (0, 2, 0, 9),
        (3, 3, 0, 9),
    ],
    "shared[1] begins with sequence 0; it must lie in shared[0] or come after it, from sequence 4 on": [
        (2, 4, 0, 9),
        (0, 2, 0, 9),
    ],
    "shared[1] begins with sequence 1; it must lie in shared[0] or come after it, from sequence 3 on": [
        (0, 3, 0, 9),
        (1, 5, 0, 9),
    ],
    "shared[0] begins with token 3; it must begin with token 0": [(0, 3, 3, 9)],
    "shared[2] begins with token 10; it must begin with token 9, where shared[0], in which it lies, ends": [
        (0, 3, 0, 9),
        (0, 0, 0, 0),
        (0, 3, 10, 12),
    ],
    "shared[0] ends with token 231; it must be from 1 to 230, " + SEES.format(2): [(2, 4, 0, 231)],
    "shared[0] ends with token 0; it must be from 1 to 230, " + SEES.format(1): [(1, 4, 0, 0)],
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows_are_named(message: str) -> None:
    with pytest.raises(ValueError) as raised:
        lean_attention.decode(**samples(), shared=ints(*BAD_ROWS[message]))
    assert str(raised.value) == f"decode: {message}"


def test_new_tokens_are_not_shared() -> None:
    """Neither those of a causal step, which not all query tokens see, nor those of a tree."""
    inputs = samples(batch=2) | {"q": torch.randn(2, 3, 8, 64).to(BF16)}
    for options, most in (({}, 228), ({"tree_mask": torch.ones(3, 3, dtype=torch.bool)}, 227)):
        lean_attention.decode(**inputs, **options, shared=ints((0, 2, 0, most)))
        with pytest.raises(ValueError, match=f"must be from 1 to {most}, the tokens that all query tokens"):
            lean_attention.decode(**inputs, **options, shared=ints((0, 2, 0, most + 1)))
    lean_attention.decode(**inputs, causal=False, shared=ints((0, 2, 0, 230)))


def test_what_it_does_not_go_with_is_named() -> None:
    one = torch.ones(1)
    row = ints((0, 6, 0, 9))
    paged = samples() | {
        "k_cache": torch.randn(12, 16, 2, 64).to(BF16),
        "v_cache": torch.randn(12, 16, 2, 64).to(BF16),
        "seq_lens": torch.full((6, 2), 20, dtype=torch.int32),
        "block_table": torch.arange(12, dtype=torch.int32).view(6, 2),
    }
    quantised = {name: torch.zeros(6, 230, 2, 64, dtype=INT8) for name in ("k_cache", "v_cache")}
    combined = {
        "cache_leftpad": samples() | {"cache_leftpad": torch.zeros(6, dtype=torch.int32)},
        "window_left": samples() | {"window_left": 500},
        "alibi_slopes": samples() | {"alibi_slopes": torch.ones(8)},
        "seq_lens of each KV head": paged,
        "a block_table of each KV head": paged
        | {
            "seq_lens": torch.full((6,), 20, dtype=torch.int32),
            "block_table": paged["block_table"][:, None].expand(6, 2, 2).contiguous(),
        },
        "a k_scale of each sequence": samples() | quantised | {"k_scale": torch.ones(6, 2), "v_scale": one},
        "a v_scale of each sequence": samples() | quantised | {"k_scale": one, "v_scale": torch.ones(6, 2)},
    }
    for why, inputs in combined.items():
        with pytest.raises(ValueError, match=f"^decode: shared cannot be combined with {why}$"):
            lean_attention.decode(**inputs, shared=row)


WRONG_TENSORS = {
    "shared has shape [4]; it must have 2 dimensions, [count, 4]": ints((0, 1, 0, 2))[0],
    "shared has shape [1, 3]; its dimension 1 must be 4, "
    "first sequence, end sequence, first token, end token": ints((0, 1, 0, 2))[:, :3],
    "shared is torch.int64; it must be torch.int32": ints((0, 1, 0, 2)).long(),
}


def test_wrong_tensors_are_named() -> None:
    for message, rows in WRONG_TENSORS.items():
        with pytest.raises(ValueError) as raised:
            lean_attention.decode(**samples(), shared=rows)
        assert str(raised.value) == f"decode: {message}"


def test_blocks_of_copies_are_not_looked_at() -> None:
    """Only the first sequence's entries of a block table count for shared tokens."""
    case = Case(F32, (64, 64, 64), layout="paged", block_size=16)
    inputs = make_inputs(case) | {"shared": ints((0, 3, 0, 32))}
    want = lean_attention.decode(**inputs)
    inputs["block_table"][1:, :2] = -5
    assert all(map(torch.equal, lean_attention.decode(**inputs), want))
    inputs["block_table"][0, 1] = -5
    with pytest.raises(ValueError, match=r"block_table\[0, 1\] is -5"):
        lean_attention.decode(**inputs)


def test_waits_end_on_few_threads() -> None:
    """A range may hold sequences and the nodes that they wait for, however it is cut."""
    inputs = samples(batch=9, heads=2)
    rows = ints((0, 9, 0, 60), (0, 6, 60, 120), (0, 3, 120, 200), (3, 6, 120, 121), (6, 9, 60, 200))
    want = lean_attention.decode(**inputs)
    before = torch.get_num_threads()
    try:
        for threads, num_ctas in itertools.product((1, 2, 5), range(1, 40, 3)):
            torch.set_num_threads(threads)
            out, lse = lean_attention.decode(**inputs, shared=rows, num_ctas=num_ctas)
            torch.testing.assert_close(out, want[0], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(lse, want[1], rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_schedule_sees_every_token_once(data: st.DataObject) -> None:
    lens = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=7), label="lens")
    q_lens = [data.draw(st.integers(1, min(3, n)), label="q_len") for n in lens]
    rows = data.draw(forests([n - q + 1 for n, q in zip(lens, q_lens, strict=True)]), label="rows")
    schedule = Schedule(
        lens,
        num_kv_heads=data.draw(st.integers(1, 2)),
        num_ctas=data.draw(st.integers(1, 40)),
        group=data.draw(st.integers(1, 5)),
        q_len=q_lens,
        tile_tokens=16,
        rows_per_block=data.draw(st.sampled_from([1, 4, 16])),
        shared=rows,
    )
    seen: dict[tuple[int, int], list[int]] = {}  # by sequence, or row of shared below 0, and KV head
    for segment in schedule.segments():
        if segment.row_block == 0:
            whose = segment.sequence if segment.shared < 0 else -1 - segment.shared
            tokens = seen.setdefault((whose, segment.kv_head), [])
            tokens += range(segment.first_token, segment.end_token)
            assert segment.into < 0 or segment.shared < 0 or segment.into < segment.shared
    for b, kv_head in itertools.product(range(len(lens)), range(schedule.num_kv_heads)):
        prefixes = [-1 - i for i, (first, end, _, _) in enumerate(rows) if first <= b < end]
        path = [token for whose in (*prefixes, b) for token in sorted(seen[whose, kv_head])]
        # Of the first row block, which may hold several query tokens.
        last = min(schedule.rows_per_block, schedule.group * q_lens[b]) - 1
        assert path == list(range(lens[b] - q_lens[b] + 1 + last // schedule.group))


def test_schedule_reads_as_a_person_would() -> None:
    schedule = Schedule([300, 200], num_kv_heads=1, num_ctas=2, tile_tokens=100, shared=[(0, 2, 0, 150)])
    assert str(schedule).splitlines() == [
        "5 LeanTiles of 100 tokens over 2 CTAs",
        "CTA 0: shared[0], KV head 0, row block 0: LeanTiles 0..1 (tokens 0..149), host, "
        "merges what is left to it",
        "CTA 0: sequence 0, KV head 0, row block 0: LeanTiles 0..0 (tokens 150..249), host, "
        "merges CTAs 1..1, leaves its states to shared[0]",
        "CTA 1: sequence 0, KV head 0, row block 0: LeanTiles 1..1 (tokens 250..299), peer of CTA 0",
        "CTA 1: sequence 1, KV head 0, row block 0: LeanTiles 0..0 (tokens 150..199), host, "
        "leaves its states to shared[0]",
    ]
    with pytest.raises(
        ValueError, match=r"^Schedule: shared\[0\] begins with token 1; it must begin with token 0"
    ):
        Schedule([300, 200], num_kv_heads=1, num_ctas=2, shared=[(0, 2, 1, 150)])
    with pytest.raises(ValueError, match=r"^Schedule: shared cannot be combined with window_left$"):
        Schedule([300, 200], num_kv_heads=1, num_ctas=2, window_left=3, shared=[(0, 2, 0, 150)])
