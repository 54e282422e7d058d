"""The stream-K schedule as a person can read it: who computes which LeanTiles, who hosts, who helps.

The arithmetic is that of `csrc/schedule.h`, which the kernels use; this module only shows it.
(Where a CPU takes several KV heads through a cache together, see `docs/cpu.md`, it counts them as one.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lean_attention._core import core


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
    _geometry: core.Geometry = field(init=False, repr=False, compare=False)

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
            object.__setattr__(self, "tile_tokens", core.lean_tile_tokens(self.head_dim))
        geometry = core.Geometry(
            num_kv_heads=self.num_kv_heads,
            group=self.group,
            rows_per_block=self.rows_per_block,
            tile_tokens=self.tile_tokens,
            window_left=self.window_left,
            window_right=self.window_right,
        )
        object.__setattr__(self, "_geometry", geometry)
        try:
            self._lengths()
        except ValueError as error:
            raise ValueError(str(error).replace("decode:", "Schedule:", 1)) from None

    @property
    def total_tiles(self) -> int:
        """LeanTiles of the whole batch."""
        return sum(self._geometry.sequence_tiles(length) for length, _, _ in self._lengths())

    def _lengths(self) -> list[tuple[tuple[int, int, int, bool], int, int]]:
        """Of each sequence of the schedule: tokens, leftpad, q_len and whether each query sees all; the row
        of `shared` that it is, and the one that merges its states."""
        batch = len(self.seq_lens)
        q_lens = [self.q_len] * batch if isinstance(self.q_len, int) else list(self.q_len)
        if self.shared:
            return core.shared_lengths(self.shared, list(self.seq_lens), q_lens, self.window_right)
        lengths = zip(self.seq_lens, self.leftpad or [0] * batch, q_lens, strict=True)
        return [((*length, False), -1, -1) for length in lengths]

    def lean_range(self, cta: int) -> tuple[int, int]:
        """LeanTiles [begin, end) of the batch that a CTA takes."""
        if not 0 <= cta < self.num_ctas:
            raise ValueError(f"lean_range: cta is {cta}; it must be from 0 to {self.num_ctas - 1}")
        return core.lean_range(cta, self.num_ctas, self.total_tiles)

    def segments(self, first_cta: int = 0, end_cta: int | None = None) -> list[Segment]:
        """The segments of CTAs [first_cta, end_cta), in order."""
        end_cta = self.num_ctas if end_cta is None else end_cta
        if not 0 <= first_cta <= end_cta <= self.num_ctas:
            raise ValueError(f"segments: CTAs [{first_cta}, {end_cta}) are not within [0, {self.num_ctas})")
        if not self.total_tiles:
            return []
        lengths, shared, into = zip(*self._lengths(), strict=True)
        rows = self._geometry.segments(lengths, self.num_ctas, first_cta, end_cta)
        return [
            Segment(cta, index - len(self.shared), *rest, shared[index], into[index])
            for cta, index, *rest in rows
        ]

    def __str__(self) -> str:
        head = f"{self.total_tiles} LeanTiles of {self.tile_tokens} tokens over {self.num_ctas} CTAs"
        return "\n".join([head, *(str(segment) for segment in self.segments())])
