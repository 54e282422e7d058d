"""Prefixes that requests share, found in block tables: without vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lean_attention
from lean_attention.integrations.vllm import prefixes
from lean_attention.integrations.vllm.prefixes import Finder, Forest, token_order

BLOCK = 4
KV_HEADS, HEADS, HEAD_DIM = 2, 4, 16


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables, lengths and counts of new tokens; requests fork from earlier ones at some block."""
    tables: list[list[int]] = []
    lens, new = [], []
    blocks = iter(range(10_000))
    for _ in range(draw(st.integers(1, 10), label="requests")):
        own = [next(blocks) for _ in range(draw(st.integers(1, 12), label="own blocks"))]
        fork = draw(st.sampled_from([None, *tables]), label="fork of")
        shared = [] if fork is None else fork[: draw(st.integers(0, len(fork)), label="blocks of it")]
        table = [*shared, *own]
        tokens = draw(st.integers(len(shared) * BLOCK + 1, len(table) * BLOCK), label="tokens")
        tables.append(table)
        lens.append(tokens)
        new.append(draw(st.sampled_from([1, 1, 1, 0, 4, 5, 30]).map(lambda n, most=tokens: min(n, most))))
    width = max(map(len, tables)) + draw(st.integers(0, 2))
    junk = draw(st.sampled_from([-1, 0, 10**9]))
    padded = np.full((len(tables), width), junk, dtype=np.int32)
    for row, table, tokens in zip(padded, tables, lens, strict=True):
        used = -(-tokens // BLOCK)
        row[:used] = table[:used]
    return padded, np.array(lens, dtype=np.int32), np.array(new, dtype=np.int32)


def find(step: tuple[np.ndarray, np.ndarray, np.ndarray], least: int) -> Forest | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "LEAST_TOKENS", least)
        return Finder(BLOCK).find(*step)


@settings(max_examples=300, deadline=None)
@given(steps(), st.sampled_from([1, BLOCK, 9, 20]))
def test_every_token_is_read_once(step: tuple[np.ndarray, np.ndarray, np.ndarray], least: int) -> None:
    """Of each sequence, by one node or by itself; and all nodes are worth it."""
    tables, lens, new = step
    forest = find(step, least)
    if forest is None:
        return
    batch = len(tables)
    order = np.arange(batch) if forest.order is None else forest.order
    assert sorted(order) == list(range(batch))
    shared = np.zeros(batch, dtype=int)  # tokens of each sequence that nodes have read
    for first, end, begin, stop in forest.rows.tolist():
        members = order[first:end]
        assert len(members) >= 2 and begin % BLOCK == stop % BLOCK == 0 and stop - begin >= least
        assert (shared[members] == begin).all()
        shared[members] = stop
        assert (stop <= lens[members] - new[members]).all()
        assert (new[members] >= 1).all() and (new[members] <= prefixes.MOST_NEW_TOKENS).all()
        same = tables[members, begin // BLOCK : stop // BLOCK]
        assert (same == same[0]).all()
    assert len(forest.rows) > 0


@settings(max_examples=200, deadline=None)
@given(steps())
def test_all_that_two_sequences_share_is_shared(step: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Where one block is worth it, no block is read twice."""
    tables, lens, new = step
    forest = find(step, least=1)
    reads = {}
    limits = np.where((new >= 1) & (new <= prefixes.MOST_NEW_TOKENS), (lens - new) // BLOCK, 0)
    for table, limit in zip(tables, limits, strict=True):
        for block in range(limit):
            path = tuple(table[: block + 1])
            reads[path] = reads.get(path, 0) + 1
    rows = [] if forest is None else forest.rows.tolist()
    saved = sum((end - first - 1) * (stop - begin) for first, end, begin, stop in rows)
    assert saved == BLOCK * sum(count - 1 for count in reads.values())


@settings(max_examples=50, deadline=None)
@given(steps(), st.sampled_from([1, 9]))
def test_results_are_those_of_the_plain_call(
    step: tuple[np.ndarray, np.ndarray, np.ndarray], least: int
) -> None:
    tables, lens, new = step
    forest = find(step, least)
    if forest is None:
        return
    pages = int(max(table[: -(-n // BLOCK)].max() for table, n in zip(tables, lens, strict=True))) + 1
    k, v = torch.randn(2, pages, BLOCK, KV_HEADS, HEAD_DIM)
    starts = np.concatenate([[0], new.cumsum()]).astype(np.int32)
    tokens = int(starts[-1]) + 2  # the last two are no one's
    q = torch.randn(tokens, HEADS, HEAD_DIM)

    def decode(q: torch.Tensor, order: np.ndarray, **options) -> torch.Tensor:
        ends = torch.tensor([0, *new[order].cumsum()], dtype=torch.int32)
        numbers = torch.from_numpy(lens[order]), torch.from_numpy(tables[order])
        return lean_attention.decode(q, k, v, *numbers, cu_seqlens_q=ends, **options)[0]

    want = decode(q, np.arange(len(lens)))
    order = np.arange(len(lens)) if forest.order is None else forest.order
    places = torch.from_numpy(token_order(order, starts, tokens))
    found = torch.full_like(q, torch.nan)
    found[places] = decode(q[places], order, shared=torch.from_numpy(forest.rows))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def table(*rows: str) -> np.ndarray:
    """Letters are blocks."""
    return np.array([[ord(block) for block in row] for row in rows], dtype=np.int32)


def forest_of(tables: np.ndarray, new: list[int] | None = None, least: int = 1) -> Forest | None:
    counts = np.array(new or [1] * len(tables), dtype=np.int32)
    lens = np.full(len(tables), tables.shape[1] * BLOCK, dtype=np.int32)
    return find((tables, lens, counts), least)


def test_an_order_that_has_sharers_side_by_side_stays() -> None:
    forest = forest_of(table("xyz", "abd", "abe", "acf", "aci", "qrs"))
    assert forest is not None and forest.order is None
    assert forest.rows.tolist() == [[1, 5, 0, 4], [1, 3, 4, 8], [3, 5, 4, 8]]


def test_sharers_come_where_the_first_of_them_is() -> None:
    forest = forest_of(table("xyz", "abd", "qrs", "xyk", "abe", "xmn"))
    assert forest is not None and forest.order is not None
    assert forest.order.tolist() == [0, 3, 5, 1, 4, 2]
    assert forest.rows.tolist() == [[0, 3, 0, 4], [0, 2, 4, 8], [3, 5, 0, 8]]


def test_a_level_that_is_too_short_is_left_to_those_below() -> None:
    forest = forest_of(table("abcdex", "abcdey", "aklmnx", "aklmny"), least=2 * BLOCK)
    assert forest is not None and forest.rows.tolist() == [[0, 2, 0, 20], [2, 4, 0, 20]]


def test_prompts_and_new_tokens_are_not_shared() -> None:
    same = table("abc", "abc", "abc", "abc")
    forest = forest_of(same, new=[1, 5, 4, 0])
    assert forest is not None and forest.order is not None
    assert forest.order.tolist() == [0, 2, 1, 3]
    assert forest.rows.tolist() == [[0, 2, 0, 8]]
    assert forest_of(same, new=[1, 5, 9, 12]) is None
    assert forest_of(table("abc"), least=BLOCK) is None
    assert forest_of(table("abc", "dbc")) is None


def test_what_lies_beyond_a_length_separates_no_one() -> None:
    """The second one's table goes on as the others' do, and in order lies between them."""
    tables = table("abcd", "abce", "abcf")
    lens = np.array([16, 11, 16], dtype=np.int32)
    forest = find((tables, lens, np.ones(3, dtype=np.int32)), least=1)
    assert forest is not None and forest.order is not None
    assert forest.order.tolist() == [0, 2, 1]
    assert forest.rows.tolist() == [[0, 3, 0, 8], [0, 2, 8, 12]]


def with_room(
    step: tuple[np.ndarray, np.ndarray, np.ndarray], number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks that new tokens are in are each request's own, as in vLLM, and there is room for more."""
    tables, lens, new = step
    tables = np.pad(tables, ((0, 0), (0, 4)), constant_values=-7)
    for request, full in enumerate((lens - new) // BLOCK):
        own = number + 100 * request
        tables[request, full:] = np.arange(own, own + tables.shape[1] - full)
    return tables, lens, new


@settings(max_examples=200, deadline=None)
@given(steps(), steps(), st.booleans(), st.data())
def test_a_finder_of_many_steps_finds_what_a_new_one_does(
    first: tuple[np.ndarray, np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray, np.ndarray],
    changes: bool,
    data: st.DataObject,
) -> None:
    """Whether requests come, go, change places or grow by a token each."""
    tables, lens, new = with_room(first, 20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "LEAST_TOKENS", BLOCK)
        finder = Finder(BLOCK)
        for _ in range(8):
            found, fresh = finder.find(tables, lens, new), Finder(BLOCK).find(tables, lens, new)
            assert (found is None) == (fresh is None)
            if found is not None and fresh is not None:
                assert found.rows.tolist() == fresh.rows.tolist()
                assert np.array_equal(found.order, fresh.order)
            lens, new = lens + 1, np.ones_like(new)
            if changes and data.draw(st.booleans(), label="changes"):
                if data.draw(st.booleans(), label="of places"):
                    order = data.draw(st.permutations(range(len(lens))))
                    tables, lens = tables[order], lens[order]
                else:
                    tables, lens, new = with_room(second, 30_000)


def test_the_next_step_is_not_searched() -> None:
    finder = Finder(BLOCK)
    blocks = -(-prefixes.LEAST_TOKENS // BLOCK)
    tables = np.arange(2 * (blocks + 3), dtype=np.int32).reshape(2, -1)
    tables[1, :blocks] = tables[0, :blocks]
    lens, one = np.full(2, blocks * BLOCK + 1, dtype=np.int32), np.ones(2, dtype=np.int32)
    forest = finder.find(tables, lens, one)
    assert forest is not None
    assert finder.find(tables, lens + BLOCK, one) is forest
    tables[1, 0] = 10**6
    assert finder.find(tables, lens + BLOCK, one) is None
