"""Shared prefixes on CUDA: what one launch makes of any forest, in any order of its CTAs, and in replays."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from tests.backends import Backend, only
from tests.cases import BF16, F16, Case, assert_close, in_dtypes, make_inputs
from tests.emulation import load
from tests.test_shared import BAD_ROWS, Row, hide_copies, ints, samples, shared_cases

on_cuda = only("emulated", "cuda")

# Three levels, over nine sequences.
DEEP = [(0, 9, 0, 60), (0, 6, 60, 120), (0, 3, 120, 200), (3, 6, 120, 121), (6, 9, 60, 200)]


def decode_emulated(**arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.lean_attn_emulated.decode(**arguments)


@on_cuda
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=shared_cases())
def test_any_forest(backend: Backend, drawn: tuple[Case, list[Row]]) -> None:
    case, rows = drawn
    case = in_dtypes(case, (F16, BF16))
    if backend.name == "emulated":
        load().configure(seed=random.randrange(2**32), resident_ctas=random.randint(1, 7))
    inputs = make_inputs(case)
    if case.quantised is None and "block_table" not in inputs:
        hide_copies(inputs, rows)
    inputs["shared"] = ints(*rows)
    assert_close(case, inputs, *backend.decode(**inputs))


@on_cuda
def test_packed_queries_and_trees(backend: Backend) -> None:
    """A node's rows are those of several sequences, whose new tokens are behind it."""
    case = Case(BF16, (120, 90, 200, 77), q_len="packed")
    inputs = make_inputs(case)
    least = min(n - count + 1 for n, count in zip(case.lens[2:], case.query_counts[2:], strict=True))
    inputs["shared"] = ints((0, 4, 0, 40), (2, 4, 40, least))
    assert_close(case, inputs, *backend.decode(**inputs))
    tree = samples(batch=3) | {"q": torch.randn(3, 3, 8, 64).to(BF16)}
    tree["tree_mask"] = torch.rand(3, 3) < 0.5
    tree["shared"] = ints((0, 3, 0, 150), (1, 3, 150, 200))
    assert_close("tree", tree, *backend.decode(**tree))


@on_cuda
def test_more_row_blocks_than_one(backend: Backend) -> None:
    """Rows of a sequence may lie in two row blocks of its node, and a row block in several sequences."""
    inputs = samples(batch=9, heads=14)  # seven rows per sequence and KV head
    inputs["shared"] = ints(*DEEP)
    for num_ctas in (0, 1, 3, 17):
        assert_close(f"{num_ctas} CTAs", inputs, *backend.decode(**inputs, num_ctas=num_ctas))


@on_cuda
@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows_are_told_of_and_share_nothing(message: str, backend: Backend) -> None:
    inputs = samples()
    want = backend.decode(**inputs)
    assert backend.take_error() == ""
    out, lse = backend.decode(**inputs, shared=ints(*BAD_ROWS[message]))
    torch.testing.assert_close(out, want[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, want[1])
    assert backend.take_error().startswith(f"decode: {message}")


@pytest.mark.slow
def test_random_interleavings() -> None:
    """One result, whatever the order in which 100 launches' CTAs, warps and lanes advance."""
    emulated, inputs, first = load(), samples(batch=9, heads=2), None
    for _ in range(100):
        seed = random.randrange(2**32)
        emulated.configure(seed=seed, resident_ctas=random.randint(1, 12))
        out, lse = decode_emulated(**inputs, shared=ints(*DEEP), num_ctas=11)
        if first is None:
            assert_close("forest", inputs, out, lse)
            first = out, lse
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1]), f"emulated device: seed={seed}"


def test_waits_end_however_ranges_are_cut() -> None:
    """A CTA may have sequences and the nodes that they wait for, and few CTAs may be resident."""
    emulated, inputs = load(), samples(batch=9, heads=2)
    want = decode_emulated(**inputs)
    for num_ctas in range(1, 40, 2):
        emulated.configure(seed=num_ctas, resident_ctas=1 + num_ctas % 3)
        out, lse = decode_emulated(**inputs, shared=ints(*DEEP), num_ctas=num_ctas)
        torch.testing.assert_close(out, want[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, want[1], rtol=1e-3, atol=1e-3)


FORESTS = [
    DEEP,
    [(0, 0, 0, 0)] * 5,
    [(2, 7, 0, 199), *[(0, 0, 0, 0)] * 3, (2, 3, 199, 200)],
    [(0, 9, 0, 60), (0, 9, 60, 61), (0, 9, 61, 200), (0, 9, 10, 70), (0, 0, 0, 0)],  # a bad one
    [*((n, n + 2, 0, 90 + n) for n in range(0, 8, 2)), (8, 9, 0, 1)],
]


@pytest.mark.slow
def test_replays_with_changing_forests() -> None:
    """What a captured graph does: the same arguments and workspace, other rows of `shared`, lengths and q."""
    emulated, inputs = load(), samples(batch=9, heads=4)
    inputs["shared"] = ints(*DEEP)
    emulated.configure(seed=5, resident_ctas=3)
    out, lse = decode_emulated(**inputs, num_ctas=7)
    for n in range(30):
        inputs["shared"].copy_(ints(*FORESTS[n % len(FORESTS)]))
        inputs["seq_lens"].copy_(torch.randint(200, 231, (9,), dtype=torch.int32))
        inputs["q"].normal_()
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        emulated.replay()
        assert_close("replay", {**inputs, "shared": None}, out, lse)
    assert "shared[3] begins with token 10; it must begin with token 200" in emulated.take_error()


@pytest.mark.parametrize(
    "fault",
    ["unordered_release", "unordered_acquire", "no_barrier_before_release", "no_barrier_after_acquire"],
)
def test_nodes_without_memory_order_are_caught(fault: str) -> None:
    # One range is one output tile: no peers, so that only nodes' states go from CTA to CTA.
    emulated, inputs = load(), samples(batch=3, shared=40, own=5, heads=2)
    inputs["shared"] = ints((0, 3, 0, 40))
    with pytest.raises(RuntimeError, match="not ordered after the store by CTA"):
        for seed in range(10):
            emulated.configure(seed=seed, fault=getattr(emulated.Fault, fault), resident_ctas=4)
            decode_emulated(**inputs, num_ctas=8)


def test_flags_of_nodes_that_stay_up_are_caught() -> None:
    """Where the last CTA to leave lowers none, a replay merges what the one before has left."""
    emulated, inputs = load(), samples(batch=3, shared=40, own=5, heads=2)
    inputs["shared"] = ints((0, 3, 0, 40))
    emulated.configure(seed=3, fault=emulated.Fault.flags_stay_up, resident_ctas=4)
    outputs = decode_emulated(**inputs, num_ctas=8)
    with pytest.raises(RuntimeError, match=r"reads what no CTA has stored|is not ordered after"):
        for _ in range(20):
            emulated.replay()
    assert len(outputs) == 2


def test_no_fault_passes() -> None:
    emulated, inputs = load(), samples(batch=9, heads=2) | {"shared": ints(*DEEP)}
    for seed in range(3):
        emulated.configure(seed=seed, resident_ctas=4)
        assert_close("no fault", inputs, *decode_emulated(**inputs, num_ctas=9))
