"""FlashAttention's function for decoding, on this package's ops: change the import and keep the call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lean_attention import ops, reference


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    sinks: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: Tensor | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn.flash_attn_with_kvcache``, version 2.8: same parameters, order, defaults and results.

    Keys and values ``k``, ``v``, if given, are written into the caches in place, from position
    ``cache_seqlens`` on; then the queries attend to all cached tokens, the new ones included.

    What differs: a row that sees nothing has a log-sum-exp of ``-inf`` (FlashAttention-2 says ``+inf``, its
    version 3 ``-inf``); any page size, group and head_dim up to 512 works, odd head_dims by padding copies of
    the caches (which costs time and memory: use a multiple of 8); float32 works on a CPU.

    Args:
        q: ``[batch, seqlen_q, nheads, headdim]``, or ``[total_q, nheads, headdim]`` with ``cu_seqlens_q``.
        k_cache: ``[batch_cache, seqlen_cache, nheads_k, headdim]``, or with ``block_table`` ``[num_blocks,
            page_block_size, nheads_k, headdim]``; changed in place where ``k`` is given.
        v_cache: the same, with a last dimension of ``headdim_v``.
        k, v: new tokens, ``[batch, seqlen_new, nheads_k, headdim]`` and ``[..., headdim_v]``, or packed with
            ``cu_seqlens_k_new``.
        rotary_cos, rotary_sin: ``[seqlen_ro, rotary_dim / 2]``: k is rotated by its positions in the cache;
            q by the same where ``causal`` or a window is set, else all of it by position ``cache_seqlens``.
            Only with ``k`` and ``v``.
        cache_seqlens: an int or ``[batch]`` int32: cached tokens, before the new ones. ``None``: the whole
            cache (not with ``k``).
        cache_batch_idx, cache_leftpad, block_table, alibi_slopes, sinks: as in
            :func:`lean_attention.decode`.
        softmax_scale: ``None``: ``headdim ** -0.5``.
        causal, window_size, softcap: as in :func:`lean_attention.decode`.
        rotary_interleaved: dims 2i and 2i + 1 are a pair, else i and i + rotary_dim / 2.
        return_softmax_lse: also return the log-sum-exp, ``[batch, nheads, seqlen_q]`` or ``[nheads,
            total_q]``.
        page_table: FlashAttention-3's name of ``block_table``.
        cu_seqlens_q, cu_seqlens_k_new: ``[batch + 1]`` int32, for packed q, and packed k and v.
        k_descale, v_descale: scales of quantised caches, as ``k_scale`` and ``v_scale`` of
            :func:`lean_attention.decode`; FlashAttention-3's ``[batch, nheads_k]`` is one of their shapes.
        qv, q_descale, rotary_seqlens, attention_chunk: FlashAttention-3 has them; given, they raise.
        num_splits, max_seqlen_q, scheduler_metadata, pack_gqa, sm_margin: accepted, and without effect: the
            stream-K schedule needs no split count, no plan and no longest length, always packs the query
            heads of a KV head, and takes the GPU as it is.

    Returns:
        ``out`` as q with ``headdim_v``, or ``(out, softmax_lse)``.

    Raises:
        ValueError: an argument is wrong, as in :func:`lean_attention.decode`, or two cannot be combined.
    """
    for name, value, default in (
        ("qv", qv, None),
        ("q_descale", q_descale, None),
        ("rotary_seqlens", rotary_seqlens, None),
        ("attention_chunk", attention_chunk, 0),
    ):
        if value is not default:
            raise ValueError(f"flash_attn_with_kvcache: {name} is not supported")
    if page_table is not None:
        if block_table is not None:
            raise ValueError("flash_attn_with_kvcache: block_table and page_table are the same; give one")
        block_table = page_table
    if (k is None) != (v is None):
        raise ValueError(
            f"flash_attn_with_kvcache: {'k' if k is None else 'v'} is missing; k and v come together"
        )
    if k is None and rotary_cos is not None:
        raise ValueError("flash_attn_with_kvcache: rotary_cos is given without k and v, which it rotates")
    if k is not None and cache_seqlens is None:
        raise ValueError("flash_attn_with_kvcache: k is given without cache_seqlens, where it would go")
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)

    local = causal or tuple(window_size) != (-1, -1)
    if k is not None:
        packed = cu_seqlens_k_new is not None
        if rotary_cos is not None:
            q = q.clone(memory_format=torch.contiguous_format)
        # Queries are rotated along where they are the new tokens, one for one.
        along = rotary_cos is not None and local and q.shape[:-2] == k.shape[:-2]
        if along and packed and cu_seqlens_q is not cu_seqlens_k_new:
            along = False
        ops.append_kv(
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens,
            block_table,
            cache_batch_idx=cache_batch_idx,
            cu_seqlens=cu_seqlens_k_new,
            q=q if along else None,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
        )
        if rotary_cos is not None and not along:
            q = _rotate(q, rotary_cos, rotary_sin, cache_seqlens, cu_seqlens_q, local, rotary_interleaved)
        new = cu_seqlens_k_new.diff() if packed else k.shape[1]
        cache_seqlens = cache_seqlens + new

    head_dim, head_dim_v = q.shape[-1], v_cache.shape[-1]
    out, lse = ops.decode(
        _padded(q),
        _padded(k_cache),
        _padded(v_cache),
        cache_seqlens,
        block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_descale,
        v_scale=v_descale,
        cu_seqlens_q=cu_seqlens_q,
        scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        window_left=window_size[0],
        window_right=window_size[1],
        softcap=softcap,
    )
    out = out[..., :head_dim_v]
    return (out, lse) if return_softmax_lse else out


def _padded(x: Tensor) -> Tensor:
    """With zeros up to a head_dim that the kernels have: no score changes, and outputs are cut off."""
    missing = -x.shape[-1] % 8
    if missing == 0:
        return x
    if x.element_size() == 1:  # zero has the same bits in all of these dtypes
        return pad(x.view(torch.uint8), (0, missing)).view(x.dtype)
    return pad(x, (0, missing))


def _rotate(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor | None,
    by_token: bool,
    interleaved: bool,
) -> Tensor:
    """q rotated by positions ``seq_lens`` (plus the token's index, if `by_token`)."""
    if cu_seqlens is None:
        token = torch.arange(q.shape[1], device=q.device)
        positions = seq_lens[:, None] + (token if by_token else token * 0)
    else:
        token = torch.arange(len(q), device=q.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        sequence = sequence.clamp(max=len(seq_lens) - 1)
        positions = seq_lens[sequence] + (token - cu_seqlens[sequence] if by_token else 0)
    positions = positions.clamp(0, len(cos) - 1).long()
    cos, sin = cos[positions][..., None, :], sin[positions][..., None, :]  # for all heads
    return reference.rotate(q, cos, sin, interleaved).to(q.dtype)
