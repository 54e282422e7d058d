"""distributed.decode over 1 to 4 processes, against the definition on the whole sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_attention import distributed
from lean_attention.distributed.exchange import merge
from lean_attention.distributed.local import Call, local_state
from tests.cases import BF16, E4M3, F16, F32, INT8, Case, any_case, assert_close
from tests.distributed.ranks import run
from tests.distributed.shards import CUTS, Sharded

CASES = [
    # One query token, whose positions play no part.
    Sharded(Case(F32)),
    Sharded(Case(BF16, lens=(5000, 3, 0, 900), heads=12, sinks=True), 16),
    Sharded(Case(F16, lens=(130, 90), heads=12, kv_heads=1, head_dim=80, head_dim_v=96, softcap=5.0), "last"),
    Sharded(Case(BF16, quantised=INT8, scales="row", heads=12, sinks=True), 5, paged=True),
    Sharded(Case(F32, heads=12, causal=False, q_len=3, scale=0.3), "last", paged=True),
    Sharded(Case(BF16, q_len="packed", causal=False, lens=(300, 1, 0, 65)), 64),
    # Several query tokens, windows, left padding.
    Sharded(Case(F32, lens=(300, 2, 0, 65), q_len=3, heads=12, sinks=True), 1),
    Sharded(Case(BF16, lens=(300, 2, 0, 65), q_len="packed", sinks=True), "uneven", paged=True),
    Sharded(Case(F32, lens=(700, 64, 3), window_left=40, leftpad=True), 16),
    Sharded(Case(F16, lens=(700, 64), q_len=3, window_left=40, window_right=1, causal=False), 5, paged=True),
    Sharded(Case(BF16, lens=(700, 64, 3), q_len=17, leftpad=True, layout="slots"), "even"),
    Sharded(Case(BF16, quantised=E4M3, scales="sequence_head", q_len=3, window_left=9), 16, paged=True),
    # ALiBi.
    Sharded(Case(F32, lens=(700, 64, 3), alibi="heads", sinks=True, heads=12), "even"),
    Sharded(Case(F32, lens=(700, 64, 3), alibi="batch_heads", q_len=5, window_left=200), "uneven"),
    Sharded(Case(BF16, lens=(700, 64, 3), alibi="heads", q_len="packed", causal=False), "even", paged=True),
    Sharded(Case(F32, lens=(700, 64, 3), alibi="heads", q_len=7, causal=False, window_right=2), "last"),
    Sharded(Case(F32, lens=(700, 64, 3), alibi="heads", q_len=3), 40),
]  # fmt: skip


def ways(arguments: dict, ranks: int) -> list[dict]:
    """Of calling with the same result to the bit."""
    found = [{}, {"exchange": "gather"}]
    if arguments["q"].shape[:-1].numel() % ranks == 0:
        found.append({"exchange": "rows"})
        if len(arguments["q"]) == 4 and "cu_seqlens_q" not in arguments:
            found.append({"exchange": "rows", "parts": 4})
    if "cu_seqlens_q" not in arguments:
        found.append({"parts": 2})
    return found


def decode_all(rank: int, arguments: list[list[dict]]) -> list[tuple]:
    """The results of all cases, whichever way they are called."""
    results, ranks = [], torch.distributed.get_world_size()
    for of_ranks in arguments:
        mine = of_ranks[rank]
        out, lse = distributed.decode(**mine)
        for way in ways(mine, ranks):
            again = distributed.decode(**mine, **way)
            assert torch.equal(again[0], out) and torch.equal(again[1], lse), way
        if mine["shards"] == "contiguous":
            first = sum(each["local_lens"] for each in of_ranks[:rank])
            first = first if rank else torch.zeros_like(mine["local_lens"])
            again = distributed.decode(**mine, first_positions=first)
            assert torch.equal(again[0], out) and torch.equal(again[1], lse), "first_positions"
        results.append((out, lse))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_matches_the_definition(ranks: int) -> None:
    made = [sharded.make(ranks) for sharded in CASES]
    of_ranks = run(ranks, decode_all, [arguments for _, arguments in made])
    for sharded, (whole, _), *results in zip(CASES, made, *of_ranks, strict=True):
        out, lse = results[0]
        assert_close(f"{sharded} over {ranks}", whole, out, lse)
        for rank, (other, other_lse) in enumerate(results):
            assert torch.equal(other, out) and torch.equal(other_lse, lse), f"{sharded}: rank {rank}"


ANY = {
    "shards": [*CUTS, 1, 5, 16],
    "ranks": [1, 2, 3, 7],
    "paged": [False, True],
    "layout": ["tokens_first", "heads_first", "slots"],
}


@settings(max_examples=80, deadline=None)
@given(case=any_case(layout=ANY["layout"]), data=st.data())
def test_any_combination_of_features(case: Case, data: st.DataObject) -> None:
    """The states of all ranks, merged in one process."""
    shards, ranks, paged = (data.draw(st.sampled_from(ANY[name])) for name in ("shards", "ranks", "paged"))
    if case.tree:
        return
    sharded = Sharded(case, shards, paged and case.layout != "slots")
    whole, of_ranks = sharded.make(ranks)
    states = []
    for rank, arguments in enumerate(of_ranks):
        first = sum((each["local_lens"] for each in of_ranks[:rank]), torch.zeros(len(case.lens)).int())
        kind = arguments.pop("shards")
        arguments.pop("sinks", None)
        call = Call(**arguments)
        if kind == "contiguous":
            placement = distributed.Placement.contiguous(call.local_lens, first, call.capacity)
        else:
            placement = distributed.Placement.round_robin(call.local_lens, kind.block, rank, ranks)
        states.append(local_state(call, placement, torch.float32))
    outs, lses = zip(*states, strict=True)
    sinks = whole["sinks"].repeat(len(lses[0]) // case.heads) if case.sinks else None
    out, lse = merge(outs, lses, sinks, whole["q"].dtype)
    rows = whole["q"].shape[:-1]
    out, lse = out.view(*rows, -1), lse.view(rows).transpose(-1, -2)
    if case.q_len == "packed":
        lse[:, int(whole["cu_seqlens_q"][-1]) :] = -torch.inf
    assert_close(str(sharded), whole, out, lse)
