"""FlashAttention's function for decoding, on this package's ops: change the import and keep the call."""

from __future__ import annotations

import numbers
import re

import torch
from torch import Tensor
from torch.nn.functional import pad

from lean_attention import ops, reference
from lean_attention._types import described, refuse_wrong_type

_SELF = "flash_attn_with_kvcache"
# What the ops' arguments are called here.
_NAMES = {
    "seq_lens": "cache_seqlens",
    "cu_seqlens": "cu_seqlens_k_new",
    "k_scale": "k_descale",
    "v_scale": "v_descale",
    "scale": "softmax_scale",
    "window_left": "window_size[0]",
    "window_right": "window_size[1]",
}
_LAYOUTS = {
    "q": "[batch, seqlen_q, nheads, headdim]",
    "k_cache": "[batch_cache, seqlen_cache, nheads_k, headdim] or pages",
    "v_cache": "[batch_cache, seqlen_cache, nheads_k, headdim_v] or pages",
    "k": "[batch, seqlen_new, nheads_k, headdim]",
}


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
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float | None = 0.0,
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
        cache_seqlens: an int or a Tensor, ``[batch]`` int32 or int64 (no list): cached tokens, before the new
            ones. ``None``: the whole cache (not with ``k``).
        cache_batch_idx, cache_leftpad, block_table, alibi_slopes, sinks: as in
            :func:`lean_attention.decode`.
        softmax_scale: ``None``: ``headdim ** -0.5``.
        causal, window_size, softcap: as in :func:`lean_attention.decode`. ``None`` is unbounded in place of a
            window or of one of its sides, as in FlashAttention-4, and no softcap.
        rotary_interleaved: dims 2i and 2i + 1 are a pair, else i and i + rotary_dim / 2.
        return_softmax_lse: also return the log-sum-exp, ``[batch, nheads, seqlen_q]`` or ``[nheads,
            total_q]``.
        page_table: FlashAttention-3's name of ``block_table``.
        cu_seqlens_q, cu_seqlens_k_new: ``[batch + 1]`` int32 or int64, for packed q, and packed k and v.
        k_descale, v_descale: scales of quantised caches, as ``k_scale`` and ``v_scale`` of
            :func:`lean_attention.decode`; FlashAttention-3's ``[batch, nheads_k]`` is one of their shapes.
        qv, q_descale, rotary_seqlens, attention_chunk: FlashAttention-3 has them; given, they raise.
        num_splits, max_seqlen_q, scheduler_metadata, pack_gqa, sm_margin: accepted, and without effect: the
            stream-K schedule needs no split count, no plan and no longest length, always packs the query
            heads of a KV head, and takes the GPU as it is.

    Returns:
        ``out`` as q with ``headdim_v``, or ``(out, softmax_lse)``.

    Raises:
        ValueError: an argument is wrong, as in :func:`lean_attention.decode`, or two cannot be combined. New
            tokens may be in the caches by then where the mistake is not about them.
        TypeError: an argument is no Tensor, or no number.
    """
    for name, value in (
        ("qv", qv),
        ("q_descale", q_descale),
        ("rotary_seqlens", rotary_seqlens),
        ("attention_chunk", attention_chunk or None),
    ):
        if value is not None:
            raise ValueError(f"{_SELF}: {name} is not supported")
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(value, Tensor):
            refuse_wrong_type(_SELF, name, value, "Tensor")
    _check_optional_tensors(
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        k_descale=k_descale,
        v_descale=v_descale,
        sinks=sinks,
    )
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if value is not None and type(value) is not float:
            refuse_wrong_type(_SELF, name, value, "Optional[float]")
    window_left, window_right = _window(window_size)
    if page_table is not None and block_table is not None:
        raise ValueError(f"{_SELF}: block_table and page_table are the same; give one")
    if (k is None) != (v is None):
        raise ValueError(f"{_SELF}: {'k' if k is None else 'v'} is missing; k and v come together")
    if k is None:
        for name, value in (
            ("rotary_cos", rotary_cos),
            ("rotary_sin", rotary_sin),
            ("cu_seqlens_k_new", cu_seqlens_k_new),
        ):
            if value is not None:
                raise ValueError(f"{_SELF}: {name} is given without k and v, which it is for")
    elif cache_seqlens is None:
        raise ValueError(f"{_SELF}: k is given without cache_seqlens, where it would go")
    _check_shapes(q, k_cache, v_cache, k, cu_seqlens_q, cu_seqlens_k_new)
    one_length = cache_seqlens is not None and not isinstance(cache_seqlens, Tensor)
    if one_length:
        cache_seqlens = _lengths(cache_seqlens, _batch(q, cu_seqlens_q), q.device)
    try:
        out, lse = _append_and_attend(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens,
            block_table if page_table is None else page_table,
            cu_seqlens_k_new,
            rotary_cos,
            rotary_sin,
            bool(rotary_interleaved),
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            k_scale=k_descale,
            v_scale=v_descale,
            cu_seqlens_q=cu_seqlens_q,
            scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            causal=bool(causal),
            window_left=window_left,
            window_right=window_right,
            softcap=0.0 if softcap is None else softcap,
        )
    except (TypeError, ValueError) as error:
        raise _as_called(error, one_length, page_table is not None) from None
    return (out, lse) if return_softmax_lse else out


def _check_optional_tensors(**tensors) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            refuse_wrong_type(_SELF, name, tensor, "Optional[Tensor]")


def _window(window_size) -> tuple[int, int]:
    if window_size is None:
        return -1, -1
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"{_SELF}: window_size is {window_size}; it must be (left, right) or None") from None
    for name, value in (("window_size[0]", left), ("window_size[1]", right)):
        if type(value) is not int:
            refuse_wrong_type(_SELF, name, value, "Optional[int]")
    return -1 if left is None else left, -1 if right is None else right


def _batch(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else max(0, cu_seqlens.numel() - 1)


def _check_shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
) -> None:
    """What the ops would not see, or would see in a copy of other shape."""
    for name, tensor, rank in (
        ("q", q, 4 if cu_seqlens_q is None else 3),
        ("k_cache", k_cache, 4),
        ("v_cache", v_cache, 4),
        ("k", k, 4 if cu_seqlens_k_new is None else 3),
    ):
        if tensor is not None and tensor.dim() != rank:
            layout = _LAYOUTS[name] if rank == 4 else "[tokens of all sequences, heads, headdim]"
            raise ValueError(
                f"{_SELF}: {name} has shape {list(tensor.shape)}; it must have {rank} dimensions, {layout}"
            )
    head_dim, cached_head_dim, head_dim_v = q.shape[-1], k_cache.shape[-1], v_cache.shape[-1]
    if cached_head_dim != head_dim:
        raise ValueError(
            f"{_SELF}: k_cache has headdim {cached_head_dim}, q has {head_dim}; they must be equal"
        )
    for name, size in (("headdim", head_dim), ("headdim_v", head_dim_v)):
        if not 1 <= size <= 512:
            raise ValueError(f"{_SELF}: {name} is {size}; it must be from 1 to 512")
    if k is None:
        return
    batch, new_batch = _batch(q, cu_seqlens_q), _batch(k, cu_seqlens_k_new)
    if new_batch != batch:
        name = "k" if cu_seqlens_k_new is None else "cu_seqlens_k_new"
        raise ValueError(f"{_SELF}: {name} is of {new_batch} sequences, q of {batch}; they must be as many")


def _lengths(cache_seqlens: object, batch: int, device: torch.device) -> Tensor:
    if not isinstance(cache_seqlens, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(
            f"{_SELF}: cache_seqlens is {described(cache_seqlens)}; it must be an int or a Tensor"
        )
    if not 0 <= cache_seqlens < 2**31:
        raise ValueError(
            f"{_SELF}: cache_seqlens is {cache_seqlens}; it must be from 0 to what the cache holds"
        )
    return torch.full((batch,), int(cache_seqlens), dtype=torch.int32, device=device)


def _as_called(error: Exception, one_length: bool, pages: bool) -> Exception:
    """An op's error in the words of this function's caller."""
    op, _, text = str(error).partition(": ")
    if op not in ("decode", "append_kv"):
        return error
    names = {**_NAMES, "block_table": "page_table" if pages else "block_table"}
    text = re.sub(r"\b(" + "|".join(names) + r")\b", lambda match: names[match[0]], text)
    if one_length:
        text = re.sub(r"\bcache_seqlens\[\d+\]", "cache_seqlens", text)
    return type(error)(f"{_SELF}: {text}")


def _append_and_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    **options,
) -> tuple[Tensor, Tensor]:
    """By the ops, whose names and values the `options` of `decode` have."""
    if k is not None:
        cu_seqlens_q = options["cu_seqlens_q"]
        local = options["causal"] or options["window_left"] != -1 or options["window_right"] != -1
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
            seq_lens,
            block_table,
            cache_batch_idx=options["cache_batch_idx"],
            cu_seqlens=cu_seqlens_k_new,
            q=q if along else None,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
        )
        if rotary_cos is not None and not along:
            q = _rotate(q, rotary_cos, rotary_sin, seq_lens, cu_seqlens_q, local, rotary_interleaved)
        seq_lens = seq_lens + (cu_seqlens_k_new.diff() if packed else k.shape[1])
    out, lse = ops.decode(_padded(q), _padded(k_cache), _padded(v_cache), seq_lens, block_table, **options)
    return out[..., : v_cache.shape[-1]], lse


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
        if len(seq_lens) == 0:  # tokens of no sequence
            return q
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        sequence = sequence.clamp(max=len(seq_lens) - 1)
        positions = seq_lens[sequence] + (token - cu_seqlens[sequence] if by_token else 0)
    positions = positions.clamp(0, len(cos) - 1).long()
    cos, sin = cos[positions][..., None, :], sin[positions][..., None, :]  # for all heads
    return reference.rotate(q, cos, sin, interleaved).to(q.dtype)
