"""The definition of the ops, in float64 and plain PyTorch. Slow and meant to be read."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    tree_mask: Tensor | None = None,
    shared: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """What `lean_attention.decode` computes. Shapes as there; the arithmetic and the results are in `dtype`.

    A score that is NaN or +inf makes its whole row NaN. With several query tokens, a NaN in a token that
    only some rows see may reach the other rows of that sequence.
    """
    num_heads, head_dim = q.shape[-2:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    k_scale, v_scale = (_row_scales(s, k_cache, block_table is not None) for s in (k_scale, v_scale))
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[3], dtype=dtype)
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    if cu_seqlens_q is None:
        lse = q.new_full((batch, num_heads, q.shape[1]), -torch.inf, dtype=dtype)
    else:
        lse = q.new_full((num_heads, len(q)), -torch.inf, dtype=dtype)
    sinks = None if sinks is None else sinks.to(dtype)

    for b in range(batch):
        if cu_seqlens_q is None:
            queries, outputs, lses = q[b], out[b], lse[b]
            tree = tree_mask if tree_mask is None or tree_mask.dim() == 2 else tree_mask[b]
        else:
            own = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
            queries, outputs, lses = q[own], out[own], lse[:, own]
            tree = None if tree_mask is None else tree_mask[own]
        q_len = len(queries)
        for kv_head in range(num_kv_heads):
            # The sequence's tokens: where each lies in the cache.
            if seq_lens is not None:
                seq_len = int(seq_lens[b] if seq_lens.dim() == 1 else seq_lens[b, kv_head])
            else:
                seq_len = block_size * (1 if block_table is None else block_table.shape[-1])
            tokens = torch.arange(seq_len)
            sequence = torch.full_like(tokens, b)
            for first, end, begin_token, end_token in [] if shared is None else shared.tolist():
                if first <= b < end:
                    sequence[begin_token:end_token] = first
            if block_table is None:
                slots = tokens
                blocks = sequence if cache_batch_idx is None else cache_batch_idx.long()[sequence]
            else:
                table = block_table if block_table.dim() == 2 else block_table[:, kv_head]
                blocks = table[sequence, tokens // block_size].long()
                blocks = blocks.clamp(0, len(k_cache) - 1)  # those that no token is seen of may hold anything
                slots = tokens % block_size
            at = (blocks, slots, kv_head)
            keys = k_cache[at].to(dtype) * k_scale(b, *at).to(dtype)
            values = v_cache[at].to(dtype) * v_scale(b, *at).to(dtype)

            heads = slice(kv_head * group, (kv_head + 1) * group)
            for i in range(q_len):
                # Which of them this query token sees.
                position = seq_len - q_len + i
                seen = tokens >= (0 if cache_leftpad is None else int(cache_leftpad[b]))
                if window_left >= 0:
                    seen &= tokens >= position - window_left
                if tree is not None:
                    new = tokens - (seq_len - q_len)
                    seen &= (new < 0) | tree[i][new.clamp(min=0)]
                elif causal:
                    seen &= tokens <= position
                elif window_right >= 0:
                    seen &= tokens <= position + window_right

                scores = scale * (queries[i, heads].to(dtype) @ keys[seen].T)  # head, token
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    slopes = alibi_slopes[heads] if alibi_slopes.dim() == 1 else alibi_slopes[b, heads]
                    scores = scores - slopes.to(dtype)[:, None] * (position - tokens[seen]).abs()
                seen_values = values[seen]
                if sinks is not None:  # a logit without a value
                    scores = torch.cat([scores, sinks[heads, None]], dim=1)
                    seen_values = torch.cat([seen_values, seen_values.new_zeros(1, seen_values.shape[1])])
                if scores.shape[1] == 0:
                    continue
                m = scores.amax(dim=1, keepdim=True)
                weights = torch.exp(scores - m.masked_fill(m == -torch.inf, 0.0))
                l = weights.sum(dim=1)  # noqa: E741  (the paper's name)
                outputs[i, heads] = (weights @ seen_values) / l.masked_fill(l == 0, 1.0)[:, None]
                lses[heads, i] = m[:, 0] + torch.log(l)
    return out, lse


def _row_scales(scales: Tensor | None, cache: Tensor, paged: bool):
    """The scale of each row (batch index, block, slot, KV head) of a quantised cache."""

    def look_up(b: int, blocks: Tensor, slots: Tensor, kv_head: int) -> Tensor:
        if scales is None:
            return torch.ones(len(blocks), 1)
        if scales.dim() == 2:  # per sequence and head
            return scales.expand(max(b + 1, len(scales)), cache.shape[2])[b, kv_head].expand(len(blocks), 1)
        return scales.expand(cache.shape[:3])[blocks, slots, kv_head, None]

    return look_up


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    q: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    slot_mapping: Tensor | None = None,
) -> None:
    """What `lean_attention.append_kv` writes: the caches, their scales where they quantise, and q.

    Rows that are quantised are rotated in float32 and rounded to k's dtype: the same bits everywhere.
    """
    block_size = k_cache.shape[1]

    def write(at: tuple[int, int], new_k: Tensor, new_v: Tensor) -> None:
        if k_scale is None:
            k_cache[at], v_cache[at] = new_k.to(k_cache.dtype), new_v
        else:
            k_cache[at], k_scale[at] = quantise(new_k.to(k.dtype), k_cache.dtype)
            v_cache[at], v_scale[at] = quantise(new_v, v_cache.dtype)

    if slot_mapping is not None:
        for slot, new_k, new_v in zip(slot_mapping.tolist(), k, v, strict=True):
            if slot != -1:
                write(divmod(slot, block_size), new_k, new_v)
        return
    rotary_dtype = torch.float64 if k_scale is None else torch.float32
    for b in range(len(seq_lens)):
        own = b if cu_seqlens is None else slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        for i in range(len(k[own])):
            position = int(seq_lens[b]) + i
            if block_table is None:
                at = (b if cache_batch_idx is None else int(cache_batch_idx[b]), position)
            else:
                at = (int(block_table[b, position // block_size]), position % block_size)
            new_k, new_v = k[own][i], v[own][i]
            if rotary_cos is not None:
                rotary = (rotary_cos[position], rotary_sin[position], rotary_interleaved, rotary_dtype)
                new_k = rotate(new_k, *rotary)
                if q is not None:
                    q[own][i] = rotate(q[own][i], *rotary).to(q.dtype)
            write(at, new_k, new_v)


def quantise(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (of the last dimension) in int8 or a float8 dtype, and what each is to be multiplied by.

    In float32, to the bit. A row of zeros has scale 0; one with NaN or infinity has scale NaN and holds ones.
    """
    rows = rows.float()
    largest = rows.new_tensor(127.0 if dtype == torch.int8 else torch.finfo(dtype).max)
    scale = rows.abs().amax(dim=-1) / largest
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    values = (rows / scale[..., None]).clamp(-largest, largest)  # a scale near 0 is inexact
    if dtype == torch.int8:
        values = values.round()
    values = torch.where(scale[..., None] == 0, 0.0, values)
    return torch.where(scale[..., None].isnan(), 1.0, values).to(dtype), scale


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Rotary embedding of the last dimension, in `dtype`; `cos` and `sin` have half the rotated dims."""
    x, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def merge_states(
    outs: list[Tensor], lses: list[Tensor], *, base: float = 2.718281828459045
) -> tuple[Tensor, Tensor]:
    """What `lean_attention.merge_states` computes, in float64. One lse of NaN or +inf makes its row NaN."""
    out = torch.stack(outs).double()  # state, batch, token, head, dim
    to_natural = torch.log(torch.tensor(base, dtype=torch.float64))
    lse = torch.stack(lses).double() * to_natural  # state, batch, head, token
    m = lse.amax(dim=0)
    weights = torch.exp(lse - m.masked_fill(m == -torch.inf, 0.0))
    l = weights.sum(dim=0)  # noqa: E741  (the paper's name)
    shares = (weights / l.masked_fill(l == 0, 1.0)).transpose(-1, -2)[..., None]
    return torch.where(shares == 0, 0.0, shares * out).sum(dim=0), (m + torch.log(l)) / to_natural
