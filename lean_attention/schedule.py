"""The stream-K schedule as a person can read it: who computes which LeanTiles, who hosts, who helps.

The arithmetic is that of `csrc/schedule.h`, which the kernels use; this module only shows it.
(Where a CPU takes several KV heads through a cache together, see `docs/cpu.md`, it counts them as one.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

from lean_attention._core import tools


def _rows(numbers: list[int], width: int) -> list[list[int]]:
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


@dataclass(frozen=True)
class Segment:
    """The LeanTiles of one output tile that one CTA computes."""

    cta: int
    sequence: int
    kv_head: int
    row_block: int
    first_tile: int  # LeanTiles [first_tile, end_tile) of the output tile
    end_tile: int
    first_token: int  # tokens [first_token, end_token) of the sequence
    end_token: int
    host: int  # the CTA that merges and writes the output tile
    last_peer: int  # CTAs host + 1 .. last_peer publish partial states for it
    shared: int = -1  # the row of `shared` that the output tile is of; -1: it is a sequence's
    into: int = -1  # the row of `shared` whose host block merges its states; -1: its own writes the output

    @property
    def is_host(self) -> bool:
        return self.cta == self.host

    @property
    def output_tile(self) -> tuple[int, int, int]:
        return self.sequence, self.kv_head, self.row_block

    def __str__(self) -> str:
        role = "host" if self.is_host else f"peer of CTA {self.host}"
        merged = []
        if self.is_host and self.last_peer > self.host:
            merged.append(f"CTAs {self.host + 1}..{self.last_peer}")
        if self.is_host and self.shared >= 0:
            merged.append("what is left to it")
        if merged:
            role += f", merges {' and '.join(merged)}"
        if self.is_host and self.into >= 0:
            role += f", leaves its states to shared[{self.into}]"
        work = "nothing to read"
        if self.end_token > self.first_token:
            work = f"LeanTiles {self.first_tile}..{self.end_tile - 1} "
            work += f"(tokens {self.first_token}..{self.end_token - 1})"
        whose = f"sequence {self.sequence}" if self.shared < 0 else f"shared[{self.shared}]"
        return f"CTA {self.cta}: {whose}, KV head {self.kv_head}, row block {self.row_block}: {work}, {role}"


@dataclass(frozen=True)
class Schedule:
    """The schedule of a batch on a grid.

    Args:
        seq_lens: tokens of each sequence.
        num_kv_heads: KV heads.
        num_ctas: CTAs (threads) of the grid, from 1 to any number.
        group: query heads per KV head.
        q_len: query tokens per sequence: one number, or one per sequence.
        head_dim: decides the tokens of a LeanTile, unless `tile_tokens` does.
        tile_tokens: tokens of a LeanTile.
        rows_per_block: query rows (`group * q_len` in all) that share one pass over K and V.
        leftpad: leading tokens of each sequence that no row sees; none where it is empty.
        window_left, window_right: visible tokens beside the query's position; -1 is unbounded and causal
            attention is `window_right=0`.
        shared: rows ``(first sequence, end sequence, first token, end token)``, as in
            :func:`lean_attention.decode`. Each is one more sequence of the schedule, after all others and
            before its parent, with the query rows of its sequences.

    Raises:
        ValueError: a number is out of range.
    """

    seq_lens: Sequence[int]
    num_kv_heads: int
    num_ctas: int
    group: int = 1
    q_len: int | Sequence[int] = 1
    head_dim: int = 128
    tile_tokens: int = 0
    rows_per_block: int = 64
    leftpad: Sequence[int] = ()
    window_left: int = -1
    window_right: int = 0
    shared: Sequence[tuple[int, int, int, int]] = ()

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "num_ctas", "group", "head_dim", "rows_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"Schedule: {name} is {getattr(self, name)}; it must be at least 1")
        for b, length in enumerate(self.seq_lens):
            if length < 0:
                raise ValueError(f"Schedule: seq_lens[{b}] is {length}; it must be at least 0")
        for name in ("q_len", "leftpad"):
            values = getattr(self, name)
            if isinstance(values, int):
                if values < 1:
                    raise ValueError(f"Schedule: {name} is {values}; it must be at least 1")
                continue
            if len(values) not in (0, len(self.seq_lens)) or (name == "q_len" and not values):
                raise ValueError(
                    f"Schedule: {name} has {len(values)} entries, seq_lens {len(self.seq_lens)}; "
                    "there must be as many"
                )
            for b, value in enumerate(values):
                if value < 0:
                    raise ValueError(f"Schedule: {name}[{b}] is {value}; it must be at least 0")
        for name, given in (("leftpad", len(self.leftpad) > 0), ("window_left", self.window_left >= 0)):
            if given and self.shared:
                raise ValueError(f"Schedule: shared cannot be combined with {name}")
        if self.tile_tokens < 0:
            raise ValueError(f"Schedule: tile_tokens is {self.tile_tokens}; it must be at least 1")
        if self.tile_tokens == 0:
            object.__setattr__(self, "tile_tokens", tools.lean_tile_tokens(self.head_dim))
        try:
            _ = self._lengths
        except ValueError as error:
            raise ValueError(str(error).replace("decode:", "Schedule:", 1)) from None

    @property
    def total_tiles(self) -> int:
        """LeanTiles of the whole batch."""
        return tools.total_tiles(self._lengths[0], **self._geometry())

    def _geometry(self) -> dict[str, int]:
        names = ("num_kv_heads", "group", "rows_per_block", "tile_tokens", "window_left", "window_right")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def _lengths(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Of each sequence of the schedule, in one list: tokens, leftpad, q_len, whether each query sees all;
        and in another the row of `shared` that it is, with the one that merges its states."""
        batch = len(self.seq_lens)
        q_lens = [self.q_len] * batch if isinstance(self.q_len, int) else [index(n) for n in self.q_len]
        seq_lens = [index(n) for n in self.seq_lens]
        if not self.shared:
            rows = zip(seq_lens, self.leftpad or [0] * batch, q_lens, strict=True)
            return [index(n) for row in rows for n in (*row, 0)], [(-1, -1)] * batch
        for i, row in enumerate(self.shared):
            if len(row) != 4:
                raise ValueError(f"Schedule: shared[{i}] has {len(row)} numbers; it must have 4")
        shared = [index(n) for row in self.shared for n in row]
        found = _rows(tools.shared_lengths(shared, seq_lens, q_lens, self.window_right), 6)
        return [n for row in found for n in row[:4]], [(node, into) for *_, node, into in found]

    def lean_range(self, cta: int) -> tuple[int, int]:
        """LeanTiles [begin, end) of the batch that a CTA takes."""
        if not 0 <= cta < self.num_ctas:
            raise ValueError(f"lean_range: cta is {cta}; it must be from 0 to {self.num_ctas - 1}")
        return tools.lean_range(cta, self.num_ctas, self.total_tiles)

    def segments(self, first_cta: int = 0, end_cta: int | None = None) -> list[Segment]:
        """The segments of CTAs [first_cta, end_cta), in order."""
        end_cta = self.num_ctas if end_cta is None else end_cta
        if not 0 <= first_cta <= end_cta <= self.num_ctas:
            raise ValueError(f"segments: CTAs [{first_cta}, {end_cta}) are not within [0, {self.num_ctas})")
        if not self.total_tiles:
            return []
        lengths, shared = self._lengths
        ctas = {"num_ctas": self.num_ctas, "first_cta": first_cta, "end_cta": end_cta}
        rows = _rows(tools.segments(lengths, **self._geometry(), **ctas), 10)
        return [
            Segment(cta, number - len(self.shared), *rest, *shared[number]) for cta, number, *rest in rows
        ]

    def __str__(self) -> str:
        head = f"{self.total_tiles} LeanTiles of {self.tile_tokens} tokens over {self.num_ctas} CTAs"
        return "\n".join([head, *(str(segment) for segment in self.segments())])
