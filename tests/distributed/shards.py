"""Cuts the tokens of a case's sequences into the shards of ranks. What no rank has is poison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lean_attention.distributed import RoundRobin
from tests.cases import INT8, Case, make_inputs, stored

# Contiguous shards: how many tokens each rank has of a sequence, by the length and the number of ranks.
CUTS = {
    "even": lambda n, ranks: [n * (r + 1) // ranks - n * r // ranks for r in range(ranks)],
    "last": lambda n, ranks: [0] * (ranks - 1) + [n],
    "first": lambda n, ranks: [n] + [0] * (ranks - 1),
    "uneven": lambda n, ranks: [*(n * r // (ranks * ranks) for r in range(ranks - 1)), 0],
}


@dataclass(frozen=True)
class Sharded:
    case: Case
    shards: str | int = "even"  # one of CUTS, or the block of round-robin shards
    paged: bool = False

    def __str__(self) -> str:
        shards = self.shards if isinstance(self.shards, str) else f"turns{self.shards}"
        return f"{self.case}-{shards}" + ("-pages" if self.paged else "")

    @property
    def whole(self) -> Case:
        """The case with one row of the cache for each sequence."""
        return replace(self.case, layout="tokens_first")

    def tokens(self, ranks: int) -> list[list[Tensor]]:
        """The positions that each rank has of each sequence."""
        return [[self._of(n, rank, ranks) for n in self.case.lens] for rank in range(ranks)]

    def _of(self, length: int, rank: int, ranks: int) -> Tensor:
        positions = torch.arange(length)
        if isinstance(self.shards, int):
            return positions[positions // self.shards % ranks == rank]
        counts = CUTS[self.shards](length, ranks)
        counts[-1] += length - sum(counts)
        first = sum(counts[:rank])
        return positions[first : first + counts[rank]]

    def make(self, ranks: int) -> tuple[dict, list[dict]]:
        """Arguments of `lean_attention.decode`, and of `lean_attention.distributed.decode` for each rank."""
        whole = make_inputs(self.whole)
        return whole, [
            self._arguments(whole, own, rank, ranks) for rank, own in enumerate(self.tokens(ranks))
        ]

    def _arguments(self, whole: dict, own: list[Tensor], rank: int, ranks: int) -> dict:
        made = {name: value for name, value in whole.items() if name not in ("k_cache", "v_cache")}
        made["local_lens"] = torch.tensor([len(tokens) for tokens in own], dtype=torch.int32)
        made["shards"] = RoundRobin(self.shards) if isinstance(self.shards, int) else "contiguous"
        capacity = max(len(tokens) for tokens in own) + 9
        rows = {name: whole[f"{name}_cache"] for name in "kv"}
        if self.case.scales == "row":
            rows |= {f"{name}_scale": whole[f"{name}_scale"] for name in "kv"}
        shard = {name: self._dense(tensor, own, capacity) for name, tensor in rows.items()}
        if self.paged:
            table = self._table(own, capacity)
            made["block_table"] = table
            shard = {name: self._pages(tensor, table, own) for name, tensor in shard.items()}
        if self.case.layout == "slots":
            slots = torch.randperm(len(own) + 2)[: len(own)].int()
            made["cache_batch_idx"] = slots
            for name, tensor in shard.items():
                moved = self._poison(tensor.new_empty(len(own) + 2, *tensor.shape[1:]))
                moved[slots.long()] = tensor
                shard[name] = moved
        made |= {name: shard[name] for name in shard if name.endswith("scale")}
        made["k_shard"], made["v_shard"] = (stored(shard[name], self.case.layout) for name in "kv")
        return made

    def _dense(self, rows: Tensor, own: list[Tensor], capacity: int) -> Tensor:
        shard = self._poison(rows.new_empty(len(own), capacity, *rows.shape[2:]))
        for b, tokens in enumerate(own):
            shard[b, : len(tokens)] = rows[b, tokens]
        return shard

    def _poison(self, rows: Tensor) -> Tensor:
        if rows.dtype == INT8:
            return rows.fill_(127)
        if rows.dtype.itemsize == 1:
            rows.view(torch.uint8).fill_(0x7F)  # NaN
            return rows
        return rows.fill_(torch.nan)

    def _table(self, own: list[Tensor], capacity: int) -> Tensor:
        per_row = -(-capacity // self.case.block_size)
        table = torch.randperm(len(own) * per_row, dtype=torch.int32).view(len(own), per_row)
        for b, tokens in enumerate(own):
            table[b, -(-len(tokens) // self.case.block_size) :] = 2**31 - 1
        return table

    def _pages(self, shard: Tensor, table: Tensor, own: list[Tensor]) -> Tensor:
        size = self.case.block_size
        pages = self._poison(shard.new_empty(table.numel(), size, *shard.shape[2:]))
        for b, tokens in enumerate(own):
            for t in range(len(tokens)):
                pages[int(table[b, t // size]), t % size] = shard[b, t]
        return pages
