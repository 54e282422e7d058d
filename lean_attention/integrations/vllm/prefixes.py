"""Which requests of a step begin with the same blocks, as rows for ``decode(shared=)``.

Prefix caching gives requests that begin alike the same blocks. Their tokens are read once for all of them
where they stand side by side in the batch, so the batch may have to be put in another order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Tokens of a node. Merging its states costs each of its sequences what reading some 100 tokens does, and
# another order needs copies of q and out. By decode's CPU time on a Xeon with AMX, 2 to 32 sequences with 64
# tokens of their own: with 256 shared ones they break even, with 512 they gain a fifth and more, but for two
# in bfloat16 that are copied.
LEAST_TOKENS = 512
# New tokens of a request that may share. Products, not reads, take the time of prompts: by the same measure
# requests lose by sharing from 16 new tokens on, and gain with 4.
MOST_NEW_TOKENS = 4
# In the place of blocks beyond a sequence's length; no block has this number.
UNSEEN = np.int32(-1)


class Forest(NamedTuple):
    """What the sequences of a step share.

    ``order`` is the batch in which sharers are side by side: its sequence ``i`` is sequence ``order[i]`` of
    the step. ``None``: they are already. ``rows`` ``[count, 4]`` int32 are decode's ``shared`` in that order.
    """

    order: np.ndarray | None
    rows: np.ndarray


class Finder:
    """Finds what the sequences of a step share, and searches only where it differs from the last."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._least = -(-LEAST_TOKENS // block_size)
        # Of the last search: its forest, how many blocks of each sequence it saw, and these blocks.
        self._forest: Forest | None = None
        self._limits = np.zeros(0, dtype=np.int64)
        self._seen = np.zeros((0, 0), dtype=np.int32)

    def find(self, tables: np.ndarray, seq_lens: np.ndarray, new_tokens: np.ndarray) -> Forest | None:
        """The prefixes that are worth sharing; ``None``: there are none.

        Blocks that sequences have grown by since the last search are taken for their own.

        Args:
            tables: ``[batch, max_blocks]``: each sequence's blocks; those beyond its length may be anything.
            seq_lens: ``[batch]``: tokens of each sequence, the new ones included.
            new_tokens: ``[batch]``: query tokens of each sequence, at its end. Whole blocks are shared that
                hold none of them.
        """
        limits = (seq_lens - new_tokens) // self.block_size
        limits[(new_tokens < 1) | (new_tokens > MOST_NEW_TOKENS) | (limits < self._least)] = 0
        if not self._is_as_before(tables, limits):
            width = int(limits.max(initial=0))
            self._limits = limits
            self._seen = np.where(np.arange(width) < limits[:, None], tables[:, :width], UNSEEN)
            self._forest = self._search()
        return self._forest

    def _is_as_before(self, tables: np.ndarray, limits: np.ndarray) -> bool:
        before = self._limits
        if len(before) != len(limits) or ((limits < before) | ((before == 0) & (limits > 0))).any():
            return False
        seen = self._seen
        return bool(((tables[:, : seen.shape[1]] == seen) | (seen == UNSEEN)).all())

    def _search(self) -> Forest | None:
        (candidates,) = self._limits.nonzero()
        if len(candidates) < 2:
            return None
        # Whoever shares the least that is shared has its last block with another. Most batches end here.
        last = self._seen[candidates, self._least - 1]
        _, group, members = np.unique(last, return_inverse=True, return_counts=True)
        candidates = candidates[members[group] > 1]
        if len(candidates) == 0:
            return None
        order, common = _sorted_tables(self._seen, self._limits, candidates)
        nodes = _worthwhile(_intervals(common, self._least), self._least)
        return _arranged(nodes, order, len(self._seen), self.block_size) if nodes else None


def token_order(order: np.ndarray, starts: np.ndarray, tokens: int) -> np.ndarray:
    """Which query tokens stand where once the sequences are in another order.

    Args:
        order: as in :class:`Forest`.
        starts: ``[batch + 1]``: where the query tokens of each sequence begin.
        tokens: of the step; those from the last entry of ``starts`` on are no sequence's, and stay.
    """
    owner = np.empty(tokens, dtype=np.int64)
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    owner[: starts[-1]] = np.repeat(position, np.diff(starts))
    owner[starts[-1] :] = len(order)
    return owner.argsort(kind="stable")


def _sorted_tables(
    seen: np.ndarray, limits: np.ndarray, candidates: np.ndarray
) -> tuple[list[int], list[int]]:
    """The candidates in the order of their tables, and how many blocks neighbours begin with alike."""
    limits = limits[candidates]
    width = int(np.partition(limits, -2)[-2])
    blocks = np.ascontiguousarray(seen[candidates, :width])
    # As strings of bytes, which numpy compares at once: any order keeps equal beginnings together.
    order = blocks.view(f"V{blocks.itemsize * width}")[:, 0].argsort(kind="stable")
    blocks, limits = blocks[order], limits[order]
    differ = blocks[1:] != blocks[:-1]
    common = np.where(differ.any(axis=1), differ.argmax(axis=1), width)
    common = np.minimum(common, np.minimum(limits[1:], limits[:-1]))
    return candidates[order].tolist(), common.tolist()


def _intervals(common: list[int], least: int) -> list[tuple[int, int, int]]:
    """All ranges ``(first, end, blocks)`` that share more blocks than any longer range, parents first."""
    found, open_ranges = [], []
    for i, blocks in enumerate([*common, 0]):
        first = i
        while open_ranges and open_ranges[-1][1] > blocks:
            first, deeper = open_ranges.pop()
            found.append((first, i + 1, deeper))
        if blocks >= least and (not open_ranges or open_ranges[-1][1] < blocks):
            open_ranges.append((first, blocks))
    return sorted(found, key=lambda node: (node[0], -node[1]))


def _worthwhile(intervals: list[tuple[int, int, int]], least: int) -> list[tuple[int, int, int, int]]:
    """Nodes ``(first, end, begin, blocks)`` with enough blocks beyond those of their parents."""
    nodes, parents = [], []
    for first, end, blocks in intervals:
        while parents and parents[-1][1] <= first:
            parents.pop()
        begin = parents[-1][3] if parents else 0
        if blocks - begin >= least:
            parents.append((first, end, begin, blocks))
            nodes.append(parents[-1])
    return nodes


def _arranged(
    nodes: list[tuple[int, int, int, int]], sequences: list[int], batch: int, block_size: int
) -> Forest:
    """The batch with the sequences of each node side by side, where the first of them was."""
    # A sequence's place is told by the first sequences of its nodes, outermost first, and itself.
    places: list[tuple[int, ...]] = [()] * batch
    leaders = []
    for first, end, _, _ in nodes:
        members = sequences[first:end]
        leaders.append(min(members))
        for sequence in members:
            places[sequence] += (leaders[-1],)
    order = sorted(range(batch), key=lambda sequence: (*places[sequence], sequence))
    position = {sequence: i for i, sequence in enumerate(order)}
    rows = [
        (position[leader], position[leader] + end - first, begin * block_size, blocks * block_size)
        for leader, (first, end, begin, blocks) in zip(leaders, nodes, strict=True)
    ]
    rows.sort(key=lambda row: (row[0], -row[1]))
    moved = any(i != sequence for i, sequence in enumerate(order))
    return Forest(np.array(order, dtype=np.int64) if moved else None, np.array(rows, dtype=np.int32))
