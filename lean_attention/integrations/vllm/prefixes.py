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


class Forest(NamedTuple):
    """What the sequences of a step share.

    ``order`` is the batch in which sharers are side by side: its sequence ``i`` is sequence ``order[i]`` of
    the step. ``None``: they are already. ``rows`` ``[count, 4]`` int32 are decode's ``shared`` in that order.
    """

    order: np.ndarray | None
    rows: np.ndarray


def find_shared(
    tables: np.ndarray, seq_lens: np.ndarray, new_tokens: np.ndarray, block_size: int
) -> Forest | None:
    """The prefixes that are worth sharing; ``None``: there are none.

    Args:
        tables: ``[batch, max_blocks]``: each sequence's blocks; those beyond its length may be anything.
        seq_lens: ``[batch]``: tokens of each sequence, the new ones included.
        new_tokens: ``[batch]``: query tokens of each sequence, at its end.
        block_size: tokens of a block. Whole blocks are shared that hold no new token.
    """
    least = -(-LEAST_TOKENS // block_size)
    limits = (seq_lens - new_tokens) // block_size
    shares = (limits >= least) & (new_tokens >= 1) & (new_tokens <= MOST_NEW_TOKENS)
    (candidates,) = shares.nonzero()
    if len(candidates) < 2:
        return None
    # Whoever shares the least that is shared has its last block with another. Most batches end here.
    _, group, members = np.unique(tables[candidates, least - 1], return_inverse=True, return_counts=True)
    candidates = candidates[members[group] > 1]
    if len(candidates) == 0:
        return None
    order, common = _sorted_tables(tables, limits, candidates)
    nodes = _worthwhile(_intervals(common, least), least)
    return _arranged(nodes, order, len(tables), block_size) if nodes else None


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
    tables: np.ndarray, limits: np.ndarray, candidates: np.ndarray
) -> tuple[list[int], list[int]]:
    """The candidates in the order of their tables, and how many blocks neighbours begin with alike."""
    limits = limits[candidates]
    width = int(np.partition(limits, -2)[-2])
    blocks = np.ascontiguousarray(tables[candidates, :width])
    for i in (limits < width).nonzero()[0]:
        blocks[i, limits[i] :] = -1
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
