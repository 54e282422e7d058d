"""Who has which tokens: where the tokens of a shard stand in their sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def tokens_before(positions: Tensor, first: Tensor | int, block: int, ranks: int) -> Tensor:
    """How many tokens are before `positions` in a shard of every ``ranks``-th block from `first` on."""
    since = (positions - first).clamp(min=0)
    each_round = block * ranks
    return since // each_round * block + (since % each_round).clamp(max=block)


@dataclass(frozen=True)
class RoundRobin:
    """Shards that get blocks of tokens in turn: rank ``t // block % ranks`` has token ``t``.

    A shard's tokens lie in its cache in the order of their positions, without gaps.
    """

    block: int

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise ValueError(f"RoundRobin: block is {self.block!r}; it must be a positive int")

    def local_lens(self, seq_lens: Tensor, rank: int, ranks: int) -> Tensor:
        """The tokens that a rank has of sequences of these lengths."""
        return tokens_before(seq_lens, rank * self.block, self.block, ranks)

    def local_tokens(self, positions: Tensor, rank: int, ranks: int) -> Tensor:
        """Where tokens at these positions lie in a rank's shard, from 0 on; -1 for those of other ranks."""
        index = positions // (self.block * ranks) * self.block + positions % self.block
        return torch.where(positions // self.block % ranks == rank, index, -1)


CONTIGUOUS = "contiguous"
Shards = str | RoundRobin


@dataclass(frozen=True)
class Placement:
    """The positions of one rank's tokens.

    Token ``j`` of sequence ``b`` in the shard is at position ``first_positions[b] + j // block * block *
    ranks + j % block``. A contiguous shard is one block as long as the cache.
    """

    lens: Tensor  # [batch], of the shard
    first_positions: Tensor  # [batch]
    block: int
    ranks: int  # whose blocks take turns

    @classmethod
    def contiguous(cls, lens: Tensor, first_positions: Tensor, capacity: int) -> Placement:
        return cls(lens, first_positions, max(capacity, 1), 1)

    @classmethod
    def round_robin(cls, lens: Tensor, block: int, rank: int, ranks: int) -> Placement:
        return cls(lens, torch.full_like(lens, rank * block), block, ranks)

    @property
    def is_contiguous(self) -> bool:
        return self.ranks == 1

    def positions(self, tokens: int) -> Tensor:
        """``[batch, tokens]``: of the first tokens of each sequence's shard."""
        index = torch.arange(tokens, device=self.lens.device)
        return (
            self.first_positions[:, None]
            + index // self.block * (self.block * self.ranks)
            + (index % self.block)
        )

    def part(self, begin: int, end: int) -> Placement:
        """That of these sequences of a batch."""
        lens, first = self.lens[begin:end], self.first_positions[begin:end]
        return Placement(lens, first, self.block, self.ranks)

    def take(self, sequences: Tensor) -> Placement:
        """That of a batch which has these sequences of this one."""
        first = self.first_positions.index_select(0, sequences)
        return Placement(self.lens.index_select(0, sequences), first, self.block, self.ranks)

    def tokens_before(self, positions: Tensor) -> Tensor:
        """``[batch]``: how many tokens of the shard are at lower positions than ``positions[b]``."""
        return torch.minimum(
            tokens_before(positions, self.first_positions, self.block, self.ranks), self.lens
        )
