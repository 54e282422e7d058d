"""The CPU's plan of a call, and the rows of numbers that it is made from (csrc/cpu/plan.h, tuning.h)."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import lean_attention
from benchmarks.cpu_decode import full_grid, subset
from benchmarks.harness import Case as StudyCase
from lean_attention import _core
from lean_attention.tools import info
from tests.cases import BF16, F32, Case, assert_close, make_inputs

ROWS = ("zen5", "zen4", "intel", "generic")
# (bytes, ways): of a Zen 4 core, and of a server core of Intel's.
SMALL_L2, LARGE_L2 = (1 << 20, 8), (2 << 20, 16)
KB = 1024
RUN, SHORT_RUN, MAX_ROWS = 64, 32, 128


def plan(row: str, case: StudyCase, **changes: object) -> dict:
    arguments = {
        "tuning": row,
        "l2": LARGE_L2,
        "dtype": str(case.dtype).removeprefix("torch."),
        "int8": False,
        "seq_lens": case.lens,
        "q_len": 1,
        "num_heads": case.heads,
        "num_kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "tokens_first": case.layout == "tokens_first",
        "page_size": 0,
        "num_ctas": 0,
        "threads": 2,
    }
    arguments |= changes
    l2_bytes, l2_ways = arguments.pop("l2")
    return _core.plan(**arguments, l2_bytes=l2_bytes, l2_ways=l2_ways)


def tuning(row: str, l2: tuple[int, int] = LARGE_L2) -> dict:
    return {each["name"]: each for each in _core.tuning_rows(*l2)}[row]


def token_bytes(case: StudyCase, int8: bool = False) -> int:
    return 2 * case.head_dim * (1 if int8 else case.dtype.itemsize)


VARIANTS = {
    "plain": {},
    "threads1": {"threads": 1},
    "threads7": {"threads": 7},
    "q5": {"q_len": 5},
    "ctas3": {"num_ctas": 3},
    "page16": {"page_size": 16},
    "page16-tokens_first": {"page_size": 16, "tokens_first": True},
    "int8": {"int8": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_is_read_once_and_limits_hold(variant: str) -> None:
    changes = VARIANTS[variant]
    for row, case in itertools.product(ROWS, [*subset(), *full_grid()]):
        limits = tuning(row)
        print(f"{row}: {case.id}")
        p = plan(row, case, **changes)
        q_len, group = changes.get("q_len", 1), case.heads // case.kv_heads
        blocks = -(-group * q_len // p["rows_per_block"])

        # Each KV head's row blocks have each token they may see exactly once.
        seen: Counter[tuple[int, int, int]] = Counter()
        ends: dict[tuple[int, int, int], int] = {}
        for _, sequence, first, count, block, begin, end in p["segments"]:
            assert count <= p["heads_per_pass"], case.id
            for head in range(first, first + count):
                assert ends.get((sequence, head, block), 0) == begin, case.id
                ends[sequence, head, block] = end
                seen[sequence, head, block] += end - begin
        assert len(seen) == len(case.lens) * case.kv_heads * blocks, case.id
        for (sequence, _, block), tokens in seen.items():
            last_row = min((block + 1) * p["rows_per_block"], group * q_len) - 1
            assert tokens == case.lens[sequence] - q_len + 1 + last_row // group, case.id

        # Rows, heads and runs.
        bytes_per_token = token_bytes(case, changes.get("int8", False))
        heads = p["heads_per_pass"]
        assert p["rows_per_block"] == min(group * q_len, MAX_ROWS), case.id
        assert p["tile_tokens"] % RUN == 0 and p["run_tokens"] in (RUN, SHORT_RUN), case.id
        assert p["passes"] == -(-case.kv_heads // heads), case.id
        tokens_first = changes.get("tokens_first", case.layout == "tokens_first")
        if not tokens_first and "page_size" not in changes:
            assert heads == 1, case.id
        if heads > 1:
            most = limits["max_heads_per_pass" if tokens_first else "max_heads_per_pass_in_pages"]
            assert heads <= most, case.id
            assert heads * SHORT_RUN * bytes_per_token <= limits["max_pass_bytes"], case.id
            if p["run_tokens"] == RUN:
                assert heads * RUN * bytes_per_token <= limits["max_long_run_bytes"], case.id

        # Ranges and threads.
        assert p["threads"] == min(changes.get("threads", 2), len(p["range_tiles"])), case.id
        if "num_ctas" in changes:
            assert len(p["range_tiles"]) == 3 and max(p["range_tiles"]) - min(p["range_tiles"]) <= 1, case.id
        else:
            tile_bytes = p["tile_tokens"] * bytes_per_token * heads
            if len(p["range_tiles"]) > 1:
                thread_bytes = sum(p["range_tiles"]) * tile_bytes / p["threads"]
                assert thread_bytes >= limits["min_thread_bytes"], case.id
            if len(p["range_tiles"]) > p["threads"]:
                short = sorted(p["range_tiles"])[:2]  # the last one to be taken may be half of the least
                assert 2 * short[0] * tile_bytes >= limits["min_range_bytes"], case.id
                assert short[1] * tile_bytes >= limits["min_range_bytes"], case.id
                published = heads * p["partial_bytes"]
                assert short[1] * tile_bytes >= limits["bytes_per_published_byte"] * published, case.id


# For two threads: heads per pass, tokens of a run and of a LeanTile, ranges.
SUBSET = {
    "bf16-h32-kv8-d128-b1-n16384": (1, 64, 128, 19),
    "f16-h32-kv8-d128-b1-n16384": (1, 64, 128, 19),
    "f32-h32-kv8-d128-b1-n16384": (1, 64, 128, 22),
    "bf16-h32-kv8-d128-b1-n1024": (1, 64, 128, 9),
    "bf16-h8-kv1-d128-b1-n131072": (1, 64, 128, 19),
    "bf16-h8-kv8-d128-b1-n16384": (1, 64, 128, 19),
    "bf16-h64-kv8-d128-b1-n16384": (1, 64, 128, 19),
    "bf16-h32-kv8-d128-b1-n16384-tokens_first": (8, 64, 64, 17),
    "bf16-h32-kv8-d128-ragged8": (1, 64, 128, 27),
    "f32-h32-kv8-d128-one-long": (1, 64, 128, 26),
}
SUBSET_ON_ZEN4 = SUBSET | {"bf16-h32-kv8-d128-b1-n16384-tokens_first": (8, 32, 64, 17)}


@pytest.mark.parametrize("row", ROWS)
def test_plans_of_the_study(row: str) -> None:
    def choices(p: dict) -> tuple[int, ...]:
        return p["heads_per_pass"], p["run_tokens"], p["tile_tokens"], len(p["range_tiles"])

    want = SUBSET_ON_ZEN4 if row == "zen4" else SUBSET
    assert {case.id: choices(plan(row, case)) for case in subset()} == want


def test_rows_differ_where_they_should() -> None:
    whole_tokens = StudyCase(torch.bfloat16, (12288,), 32, 32, 128, "tokens_first")
    few_heads = StudyCase(torch.bfloat16, (49152,), 32, 8, 128, "tokens_first")

    def choices(case: StudyCase, row: str, l2: tuple[int, int] = LARGE_L2) -> tuple[int, int]:
        p = plan(row, case, l2=l2)
        return p["heads_per_pass"], p["run_tokens"]

    assert choices(whole_tokens, "zen5") == (32, SHORT_RUN)
    assert choices(whole_tokens, "zen4") == (16, SHORT_RUN)
    assert choices(few_heads, "zen5") == (8, RUN)
    assert choices(few_heads, "zen4") == (8, SHORT_RUN)
    # An L2 like theirs has the generic row agree with zen4, and one of many ways lets long runs stay.
    assert choices(whole_tokens, "generic", SMALL_L2) == (16, SHORT_RUN)
    assert choices(few_heads, "generic", SMALL_L2) == (8, SHORT_RUN)
    assert choices(few_heads, "generic", LARGE_L2) == (8, RUN)
    assert choices(whole_tokens, "generic", LARGE_L2) == (32, SHORT_RUN)
    # A small L2 leaves room for fewer heads, but never for none.
    assert choices(whole_tokens, "generic", (64 * KB, 8)) == (1, RUN)
    assert {row: plan(row, few_heads)["prefetch_level"] for row in ROWS} == {
        "zen5": 1,
        "zen4": 2,
        "intel": 1,
        "generic": 2,
    }
    wide = StudyCase(torch.float32, (8192,), 32, 8, 128)
    assert {row: plan(row, wide)["prefetch_level"] for row in ROWS} == {
        "zen5": 1,
        "zen4": 2,
        "intel": 2,
        "generic": 2,
    }
    # Row for row of a heads-first cache there is nothing to choose.
    for case in (case for case in full_grid() if case.layout == "heads_first"):
        plans = [plan(row, case) for row in ROWS]
        for p in plans:
            del p["prefetch_level"], p["touch_tokens"]
        assert all(p == plans[0] for p in plans), case.id


def test_rows_of_quantised_caches_are_short_runs() -> None:
    """Where the kernel does not take them as they are."""
    case = StudyCase(torch.float32, (4096,), 8, 8, 128)
    p = plan("generic", case, int8=True)
    assert p["run_tokens"] == (SHORT_RUN if p["dequantises"] else RUN)
    assert not plan("generic", case)["dequantises"]


def test_a_small_cache_is_one_threads() -> None:
    case = StudyCase(torch.bfloat16, (100,), 4, 1, 128)
    assert plan("generic", case, threads=8)["threads"] == 1
    large = StudyCase(torch.bfloat16, (65536,), 4, 1, 128)
    assert plan("generic", large, threads=8)["threads"] == 8


@pytest.mark.parametrize("row", ROWS)
def test_with_a_grid_threads_change_nothing(row: str) -> None:
    for case in subset():
        plans = [plan(row, case, num_ctas=5, threads=threads) for threads in (1, 2, 16)]
        for p in plans:
            del p["threads"]
        assert plans[0] == plans[1] == plans[2], case.id


@pytest.mark.parametrize("row", ROWS)
def test_every_row_can_be_forced(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAN_ATTENTION_TUNING", row)
    assert _core.tuning()["name"] == row
    assert f"{row} (LEAN_ATTENTION_TUNING={row})" in info.describe()
    layouts = ("tokens_first", "heads_first", "paged_heads_first")
    for dtype, layout in itertools.product((BF16, F32), layouts):
        case = Case(dtype, lens=(3000, 17, 0), heads=8, kv_heads=4, layout=layout)
        inputs = make_inputs(case)
        assert_close(case, inputs, *lean_attention.decode(**inputs))


def test_an_unknown_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAN_ATTENTION_TUNING", "zen9")
    inputs = make_inputs(Case(torch.float32, lens=(5,)))
    with pytest.raises(
        ValueError, match=r"LEAN_ATTENTION_TUNING: unknown row zen9 \(rows: zen5 zen4 intel generic\)"
    ):
        lean_attention.decode(**inputs)
