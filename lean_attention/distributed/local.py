"""The partial state of one rank: attention to its shard, by `lean_attention.decode`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lean_attention import ops
from lean_attention.distributed.placement import Placement

NAME = "distributed.decode"
MERGED_AT_ONCE = 32  # partial states of a shard's blocks


@dataclass(frozen=True)
class Call:
    """The arguments that :func:`lean_attention.decode` has too, of one rank."""

    q: Tensor
    k_shard: Tensor
    v_shard: Tensor
    local_lens: Tensor
    block_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None  # positions of the whole sequence, like seq_lens
    alibi_slopes: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    seq_lens: Tensor | None = None  # of the whole sequences
    scale: float | None = None
    causal: bool = True
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    num_ctas: int = 0

    @property
    def batch(self) -> int:
        return len(self.q) if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def capacity(self) -> int:
        """Tokens that the cache of a sequence can hold."""
        return self.k_shard.shape[1] * (1 if self.block_table is None else self.block_table.shape[-1])

    @property
    def has_several_queries(self) -> bool:
        return self.cu_seqlens_q is not None or self.q.shape[1] != 1

    @property
    def hides_later_tokens(self) -> bool:
        """Whether a query token may not see one behind it: the last one of a sequence has none behind it."""
        return self.has_several_queries and (self.causal or self.window_right >= 0)

    @property
    def what_needs_seq_lens(self) -> str | None:
        """In words; ``None``: nothing does."""
        if self.hides_later_tokens:
            return "several query tokens"
        if self.window_left >= 0:
            return "window_left"
        return None if self.alibi_slopes is None else "alibi_slopes"

    @property
    def needs_positions(self) -> bool:
        return self.what_needs_seq_lens is not None or self.cache_leftpad is not None

    def part(self, begin: int, end: int) -> Call:
        """Of these sequences of a batch that is not packed."""
        own = slice(begin, end)
        taken = {
            name: value[own]
            for name in ("q", "local_lens", "block_table", "cache_batch_idx", "cache_leftpad", "seq_lens")
            if (value := getattr(self, name)) is not None
        }
        if self.alibi_slopes is not None and self.alibi_slopes.dim() == 2:
            taken["alibi_slopes"] = self.alibi_slopes[own]
        has_own_caches = self.block_table is None and self.cache_batch_idx is None
        if has_own_caches:
            taken |= {"k_shard": self.k_shard[own], "v_shard": self.v_shard[own]}
        for name in ("k_scale", "v_scale"):
            scale = getattr(self, name)
            of_sequences = scale is not None and (scale.dim() == 2 or (scale.dim() == 3 and has_own_caches))
            if of_sequences and len(scale) > 1:
                taken[name] = scale[own]
        return replace(self, **taken)


def local_state(
    call: Call, placement: Placement | None, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The rank's ``(out, lse)``: ``[rows, head_dim_v]`` and ``[rows]``; a row is a head of a query token.

    `out_dtype` is the op's; with ALiBi, where states are merged here, the output is float32. This is the one
    place that tells the op of positions. `placement` may be ``None`` where they play no part.
    """
    if placement is None or not call.needs_positions:
        out, lse = _decode(call, call.local_lens, out_dtype, causal=False)
        return out.flatten(0, -2), lse.transpose(-1, -2).flatten()
    out, lse = _state_by_ranges(call, placement, out_dtype)
    return out.flatten(0, 1), lse.flatten()


def _state_by_ranges(
    call: Call, placement: Placement, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """``[tokens, heads, head_dim_v]`` and ``[tokens, heads]``: each query token as a sequence of its own.

    A shard keeps the order of positions, so what a query token sees of it is one range, the op's `seq_lens`
    and `cache_leftpad`. The query tokens of a sequence share what all of them see: see `_seen_by_all`.

    With ALiBi a token at distance ``d`` loses ``slope * d``. The op takes the query token for the range's
    last one, at ``last``; it is at ``p``. For a token at ``t`` of a range without gaps that lies at or before
    ``p``, the distance is ``p - t = (last - t) + (p - last)``, and the op has ``last - t``. So all scores are
    too high by ``slope * (p - last)``. The softmax does not change by that, and the log-sum-exp is too high
    by as much. For a range behind ``p`` the distance is ``t - p = -(last - t) - (p - last)``: the same with
    ``-slope`` in the place of ``slope``. A range on both sides of ``p`` is cut in two, and one of a
    round-robin shard into its blocks, each of them a call.
    """
    rows = _one_query_each(call)
    if rows.sequences is not None:
        placement = placement.take(rows.sequences)
    position = rows.position
    end = placement.lens
    if call.hides_later_tokens:
        right = 0 if call.causal else call.window_right
        end = placement.tokens_before(position + right + 1)
    if rows.belong is not None:
        end = torch.where(rows.belong, end, 0)
    begin = torch.zeros_like(end)
    if call.window_left >= 0:
        begin = placement.tokens_before(position - call.window_left)
    if call.cache_leftpad is not None:
        begin = torch.maximum(begin, placement.tokens_before(rows.call.cache_leftpad))
    begin = torch.minimum(begin, end)
    if call.alibi_slopes is None:
        if call.window_left < 0 and call.cache_leftpad is None:
            out, lse = _decode(rows.call, end, out_dtype, shared=_seen_by_all(call, end))
        else:
            out, lse = _decode(rows.call, end, out_dtype, begin)
        return out.squeeze(1), lse.squeeze(2)

    ranges = [(begin, end, 1)]
    if call.has_several_queries and not call.causal:
        middle = torch.maximum(torch.minimum(placement.tokens_before(position + 1), end), begin)
        ranges = [(begin, middle, 1), (middle, end, -1)]
    states: list[tuple[Tensor, Tensor]] = []
    for block in range(0, max(call.capacity, 1), placement.block):
        gap = block * (placement.ranks - 1)  # between where the block would be without gaps, and where it is
        for range_begin, range_end, side in ranges:
            first, last = (x.clamp(block, block + placement.block) for x in (range_begin, range_end))
            slopes = side * rows.call.alibi_slopes
            out, lse = _decode(rows.call, last, torch.float32, first, alibi_slopes=slopes)
            missing = position - (placement.first_positions + gap + last - 1)
            states.append((out.squeeze(1), lse.squeeze(2) - slopes * missing[:, None]))
        if len(states) >= MERGED_AT_ONCE:
            states = [_merged(states)]
    return _merged(states)


def _merged(states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of several states."""
    if len(states) == 1:
        return states[0]
    outs, lses = zip(*states, strict=True)
    out, lse = ops.merge_states(list(outs), [lse.t() for lse in lses])
    return out, lse.t()


def _seen_by_all(call: Call, end: Tensor) -> Tensor | None:
    """The op's `shared`: of each sequence, the tokens that all its query tokens see, as its first one does.

    `end` is how many each query token sees. ``None``: there is nothing to share, or `shared` does not go with
    the call's arguments.
    """
    of_sequences = any(x is not None and x.dim() == 2 and len(x) > 1 for x in (call.k_scale, call.v_scale))
    of_heads = call.block_table is not None and call.block_table.dim() == 3
    if not call.has_several_queries or of_sequences or of_heads or len(end) == 0:
        return None
    if call.cu_seqlens_q is None:
        first = torch.arange(call.batch, device=end.device) * call.q.shape[1]
        last = first + call.q.shape[1]
    else:
        first, last = call.cu_seqlens_q[:-1], call.cu_seqlens_q[1:]
    tokens = end.index_select(0, first.clamp(min=0, max=len(end) - 1))
    rows = torch.stack([first, last, torch.zeros_like(first), tokens.to(first.dtype)], dim=1)
    return torch.where(((last > first) & (tokens > 0))[:, None], rows, 0).to(torch.int32)


class _Rows(NamedTuple):
    """A call with one query token a sequence, and where these come from."""

    call: Call
    sequences: Tensor | None  # in the call that it is made of; None: the same
    position: Tensor | None  # None where the lengths of the whole sequences are
    belong: Tensor | None = None  # whether to a sequence; None: all do


def _one_query_each(call: Call) -> _Rows:
    if not call.has_several_queries:
        return _Rows(call, None, None if call.seq_lens is None else call.seq_lens - 1)
    device, belong = call.q.device, None
    if call.cu_seqlens_q is None:
        q_len = call.q.shape[1]
        sequences = torch.arange(call.batch, device=device).repeat_interleave(q_len)
        back = q_len - torch.arange(q_len, device=device).repeat(call.batch)
    else:
        ends = call.cu_seqlens_q[1:].contiguous()
        tokens = torch.arange(len(call.q), device=device, dtype=ends.dtype)
        sequences = torch.bucketize(tokens, ends, right=True)
        belong = sequences < call.batch
        sequences = sequences.clamp(max=call.batch - 1)
        back = ends.index_select(0, sequences) - tokens

    def each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, sequences)

    def scales(tensor: Tensor | None) -> Tensor | None:
        of_sequences = tensor is not None and tensor.dim() == 2 and len(tensor) > 1
        return each(tensor) if of_sequences else tensor

    slopes = call.alibi_slopes
    slots = None
    if call.block_table is None:
        slots = sequences if call.cache_batch_idx is None else each(call.cache_batch_idx)
    rows = Call(
        call.q.reshape(-1, 1, *call.q.shape[-2:]),
        call.k_shard,
        call.v_shard,
        each(call.local_lens),
        each(call.block_table),
        cache_batch_idx=slots,
        cache_leftpad=each(call.cache_leftpad),
        alibi_slopes=each(slopes) if slopes is not None and slopes.dim() == 2 else slopes,
        k_scale=scales(call.k_scale),
        v_scale=scales(call.v_scale),
        scale=call.scale,
        softcap=call.softcap,
        num_ctas=call.num_ctas,
    )
    position = None if call.seq_lens is None else each(call.seq_lens) - back
    return _Rows(rows, sequences, position, belong)


def _decode(
    call: Call,
    lens: Tensor,
    out_dtype: torch.dtype | None,
    begin: Tensor | None = None,
    *,
    alibi_slopes: Tensor | None = None,
    shared: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """The op on the tokens from `begin` to `lens` of each shard."""
    return ops.decode(
        call.q,
        call.k_shard,
        call.v_shard,
        lens,
        call.block_table,
        cache_batch_idx=call.cache_batch_idx,
        cache_leftpad=begin,
        alibi_slopes=alibi_slopes,
        k_scale=call.k_scale,
        v_scale=call.v_scale,
        cu_seqlens_q=call.cu_seqlens_q,
        shared=shared,
        scale=call.scale,
        causal=causal,
        softcap=call.softcap,
        num_ctas=call.num_ctas,
        out_dtype=out_dtype,
    )
