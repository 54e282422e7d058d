"""Positions of sharded tokens, against a list of them."""

from __future__ import annotations

import pytest
import torch

from lean_attention.distributed import Placement, RoundRobin
from tests.cases import Case
from tests.distributed.shards import CUTS, Sharded
from tests.errors import assert_each_raises

LENS = (0, 1, 7, 64, 100)


@pytest.mark.parametrize("shards", [*CUTS, 1, 3, 16, 200], ids=str)
def test_positions(shards: str | int) -> None:
    for ranks in (1, 2, 3, 5):
        tokens = Sharded(Case(lens=LENS), shards).tokens(ranks)
        for rank, own in enumerate(tokens):
            lens = torch.tensor([len(positions) for positions in own], dtype=torch.int32)
            if isinstance(shards, int):
                placement = Placement.round_robin(lens, shards, rank, ranks)
                want = RoundRobin(shards).local_lens(torch.tensor(LENS), rank, ranks)
                assert lens.tolist() == want.tolist()
            else:
                first = torch.tensor([sum(len(each[b]) for each in tokens[:rank]) for b in range(len(LENS))])
                placement = Placement.contiguous(lens, first.int(), 120)
            for b, positions in enumerate(own):
                assert placement.positions(len(positions))[b].tolist() == positions.tolist()
                for position in (-5, 0, 1, 15, 16, 17, 63, 64, 99, 100, 1000):
                    before = placement.tokens_before(torch.full((len(LENS),), position))
                    assert int(before[b]) == int((positions < position).sum()), (ranks, rank, b, position)


def test_local_tokens() -> None:
    positions = torch.arange(100)
    for block, ranks in ((1, 3), (8, 2), (64, 4)):
        shards = RoundRobin(block)
        for rank in range(ranks):
            local = shards.local_tokens(positions, rank, ranks)
            own = positions // block % ranks == rank
            assert (local[~own] == -1).all()
            assert local[own].tolist() == list(range(int(own.sum())))


def test_errors() -> None:
    bad = [(0, "block is 0; it must be a positive int"), (1.5, "block is 1.5"), (True, "block is True")]
    assert_each_raises(ValueError, "RoundRobin", RoundRobin, bad)
