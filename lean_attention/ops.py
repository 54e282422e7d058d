"""The public functions and what `torch.library` needs to know of the ops beyond their C++ kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lean_attention import _autocast
from lean_attention._core import NAMESPACE, ops, tools
from lean_attention._dispatch import call, needs_full_dispatch, refuse_gradients
from lean_attention._types import refuse_wrong_types

_decode = ops.decode.default
_decode_out = ops.decode_out.default
_append_kv = ops.append_kv.default
_merge_states = ops.merge_states.default
_OPTIONS = ("scale", "causal", "window_left", "window_right", "softcap", "num_ctas", "out_dtype")
_DEFAULTS = (None, True, -1, -1, 0.0, 0, None)
# torch.compile before 2.13 has an op write a graph's input that begins inside its storage to another place.
_COMPILER_LOSES_OFFSETS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


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
    num_ctas: int = 0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of a few query tokens over long KV caches, scheduled stream-K.

    Every CTA reads an equal share of all caches, whatever the lengths (on a CPU threads share what is left
    until the end, so that they end together), and the pieces of an output are merged in the same kernel
    (LeanAttention, arXiv 2405.10480, section 4).
    The definition of the result is :func:`lean_attention.reference.decode`.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]``, float16, bfloat16 or, on a CPU, float32. Query token
            ``i`` sits at position ``seq_len - q_len + i`` of its sequence: the new tokens are in the cache
            already. With ``cu_seqlens_q``: ``[total_q, num_heads, head_dim]``.
        k_cache: ``[batch, max_len, num_kv_heads, head_dim]`` on q's device, or, with ``block_table``,
            ``[num_blocks, block_size, num_kv_heads, head_dim]``. In q's dtype, or quantised: float8_e4m3fn,
            float8_e5m2 or int8. ``num_heads`` must be a multiple of ``num_kv_heads``: head ``h`` reads KV
            head ``h // (num_heads // num_kv_heads)``.
        v_cache: the same, with a last dimension of ``head_dim_v``.
        seq_lens: ``[batch]`` int32 or int64 on q's device: tokens in use, the new ones included, from 0 to
            what the cache holds. What lies beyond is never read. ``None``: all of it. With ``block_table``
            also ``[batch, num_kv_heads]``: a length of each KV head's own.
        block_table: ``[batch, max_blocks]`` or ``[batch, num_kv_heads, max_blocks]``, int32 or int64: token
            ``t`` of a sequence lies in slot ``t % block_size`` of block ``block_table[sequence, t //
            block_size]``. Any block size; entries beyond a sequence's length may hold anything; blocks may be
            shared.
        cache_batch_idx: ``[batch]`` int32 or int64: the slot of the cache, along its first dimension, that a
            sequence has; without it sequence ``b`` has slot ``b``. Not with ``block_table``.
        cache_leftpad: ``[batch]`` int32 or int64: leading tokens that no row sees. Lengths and positions
            count them.
        alibi_slopes: ``[num_heads]`` or ``[batch, num_heads]`` float32: a score at a distance of ``d`` tokens
            loses ``slope * d`` (after the softcap).
        sinks: ``[num_heads]`` float32: a logit that joins the denominator of the softmax, and has no value.
        k_scale, v_scale: float32, what the rows of quantised caches are multiplied by: a scalar,
            ``[num_kv_heads]``, ``[batch, num_kv_heads]``, or one per row, in the shape of the cache without
            its last dimension; any dimension may be 1. int8 caches must have them.
        cu_seqlens_q: ``[batch + 1]`` int32 or int64: sequence ``b`` has query tokens ``cu_seqlens_q[b]`` to
            ``cu_seqlens_q[b + 1] - 1`` of a packed q; it begins with 0. Tokens from the last entry on belong
            to no sequence and come out as rows that see nothing.
        tree_mask: bool, ``[q_len, q_len]``, ``[batch, q_len, q_len]`` or, with ``cu_seqlens_q``,
            ``[total_q, max_q_len]``: which of its sequence's new tokens a query token sees, in place of the
            causal rule. It sees all older ones. Not with ``window_left``, ``alibi_slopes`` or
            ``causal=False``.
        shared: ``[count, 4]`` int32 on q's device, rows ``(first sequence, end sequence, first token, end
            token)``: these sequences have the same K and V for these tokens, which are read once for all of
            them, where the first one has them. The rows are a forest: ranges of sequences are nested (equal
            ones count as nested) or disjoint, parents come before their children, siblings in order, and a
            row's tokens begin where its parent's end, a root's with token 0. All query tokens must see them.
            ``(0, 0, 0, 0)`` is an empty row, so that a captured graph holds any forest of up to ``count``
            rows. The result is that of the call without it, within rounding. Not with ``cache_leftpad``,
            ``window_left``, ``alibi_slopes``, lengths or tables of each KV head, or scales of each sequence.
            Where a row is invalid, a call on a GPU shares nothing, and ``check_errors`` tells.
        scale: factor of ``q @ k``; ``None``: ``head_dim ** -0.5``.
        causal: a query token sees no later position than its own. Rows before the start of the sequence
            (where ``q_len > seq_len``) see nothing.
        window_left, window_right: a token at position ``p`` sees ``p - window_left`` to
            ``p + window_right``; -1 is unbounded. Tokens that no row sees are not read. ``causal`` puts 0 in
            the place of ``window_right``.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0: they stay.
        num_ctas: lean ranges to cut the work into; 0 lets the backend choose. The result depends on it in
            rounding only, and is bitwise the same for the same inputs and ``num_ctas``.
        out, lse: where to write the results, in their shapes, of any strides with a contiguous last dimension
            and no element twice in memory. ``out`` is in q's dtype or float32, ``lse`` in float32. ``out``
            alone will do. With both, nothing is allocated but, on a GPU, the workspace.
        out_dtype: of ``out``: q's dtype (autocast's under autocast) or float32, what outputs are before they
            are rounded; ``None``: that of ``out`` where it is given, else q's. Partial outputs lose nothing
            in float32 until :func:`merge_states` merges them.

    All tensors may have any strides as long as the last dimension is contiguous: a cache stored
    ``[batch, heads, tokens, dim]`` is passed as ``cache.transpose(1, 2)``, pages stored ``[blocks, heads,
    block, dim]`` likewise, without a copy. ``head_dim`` and ``head_dim_v`` are multiples of 8 up to 512 and
    may differ.

    Under ``torch.autocast`` q and caches that are not quantised are cast to its dtype (to that of ``out``
    where it is given and they do not go with it as they are), the whole caches at every call: keep them in
    that dtype.

    Returns:
        ``(out, lse)``: ``out`` is ``[batch, q_len, num_heads, head_dim_v]`` in `out_dtype`; ``lse`` is
        ``[batch, num_heads, q_len]``, float32, the natural logarithm of the softmax's denominator (sinks
        included). With ``cu_seqlens_q`` they are ``[total_q, num_heads, head_dim_v]`` and ``[num_heads,
        total_q]``. A row that sees nothing gives zeros and ``-inf`` (with a sink: zeros and the sink).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, stride or value, or two cannot be
            combined. On a CPU also a length or an index out of range; on CUDA, where the host does not look
            at them, they are brought into range and :func:`check_errors` tells of them.
        TypeError: an argument is no Tensor, or no number.
        RuntimeError: the result was asked for its gradient; or the GPU cannot run the kernels.
    """
    tensors = (
        q,
        k_cache,
        v_cache,
        seq_lens,
        block_table,
        cache_batch_idx,
        cache_leftpad,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        cu_seqlens_q,
        tree_mask,
        shared,
    )
    named = (scale, causal, window_left, window_right, softcap, num_ctas, out_dtype)
    try:
        options = {} if named == _DEFAULTS else dict(zip(_OPTIONS, named, strict=True))
        if out is None and lse is None:
            if options:
                return call(_decode, *tensors, **options)
            # The usual call, with as little code as can be: after a cache was read none of it is in the
            # processor's caches, and takes ten times as long.
            if needs_full_dispatch():
                return _decode(*tensors)
            with torch._C._AutoDispatchBelowAutograd():
                return _decode(*tensors)
        if out is None:
            raise ValueError("decode: out is missing; lse is given with it, or not at all")
        if lse is None:
            lse = q.new_empty(*q.shape[:-3], *q.shape[-3:-1][::-1], dtype=torch.float32)
        if options.pop("out_dtype", None) not in (None, out.dtype):
            raise ValueError(f"decode: out_dtype is {out_dtype}, and out is {out.dtype}; they must be equal")
        call(_decode_out, *tensors[:3], out, lse, *tensors[3:], **options)
        return out, lse
    except Exception:
        refuse_wrong_types("decode", _decode, tensors, dict(zip(_OPTIONS, named, strict=True)))
        if out is not None and lse is not None:
            refuse_wrong_types("decode", _decode_out, (*tensors[:3], out, lse), {})
        raise


def _refuse_lost_offsets(op_name: str, **written: Tensor | None) -> None:
    """While PyTorch traces an op that writes these."""
    for name, tensor in written.items():
        if _COMPILER_LOSES_OFFSETS and tensor is not None and tensor.storage_offset() != 0:
            raise ValueError(
                f"{op_name}: {name} begins {tensor.storage_offset()} elements into its storage; before 2.13 "
                "PyTorch's compiler would write it to another place: give it memory of its own"
            )


def _fake_attention(q, k_cache, v_cache, packed: bool, out_dtype: torch.dtype | None = None):
    # The kernel checks everything; these are the mistakes that would make nonsense of a trace.
    for name, tensor, rank in (
        ("q", q, 3 if packed else 4),
        ("k_cache", k_cache, 4),
        ("v_cache", v_cache, 4),
    ):
        torch._check_value(
            tensor.dim() == rank,
            lambda name=name, tensor=tensor, rank=rank: (
                f"decode: {name} has shape {list(tensor.shape)}; it must have {rank} dimensions"
            ),
        )
        torch._check_value(
            tensor.device == q.device,
            lambda name=name, tensor=tensor: (
                f"decode: {name} is on {tensor.device}, q on {q.device}; they must be on the same device"
            ),
        )
    out = q.new_empty(*q.shape[:-1], v_cache.shape[3], dtype=out_dtype)
    lse = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)
    return out, lse


@torch.library.register_fake(f"{NAMESPACE}::decode")
def _(
    q,
    k_cache,
    v_cache,
    seq_lens=None,
    block_table=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    alibi_slopes=None,
    sinks=None,
    k_scale=None,
    v_scale=None,
    cu_seqlens_q=None,
    tree_mask=None,
    shared=None,
    *,
    out_dtype=None,
    **_options,
):
    return _fake_attention(q, k_cache, v_cache, cu_seqlens_q is not None, out_dtype)


@torch.library.register_fake(f"{NAMESPACE}::decode_out")
def _(q, k_cache, v_cache, out, lse, *_tensors, **_options):
    _refuse_lost_offsets("decode", out=out, lse=lse)


# For benchmarks only: decode by FlashAttention-2's and FlashDecoding's schedules, and what decode reads
# without what it computes (outputs are 0, log-sum-exps -inf).
@torch.library.register_fake(f"{NAMESPACE}::decode_fixed_split")
@torch.library.register_fake(f"{NAMESPACE}::read_only")
def _(q, k_cache, v_cache, seq_lens=None, **_options):
    return _fake_attention(q, k_cache, v_cache, False)


def merge_states(
    outs: list[Tensor],
    lses: list[Tensor],
    *,
    base: float = math.e,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint sets of tokens into attention over their union.

    Args:
        outs: partial outputs, each ``[batch, q_len, num_heads, head_dim_v]`` or ``[total_q, num_heads,
            head_dim_v]``, float32, float16 or bfloat16, all in one dtype.
        lses: their log-sum-exps, each ``[batch, num_heads, q_len]`` or ``[num_heads, total_q]``, float32. A
            state of ``-inf`` (nothing seen) weighs nothing, whatever its output holds; NaN and ``+inf`` make
            their row NaN. All finite ones are right, also near the limits of float32.
        base: of the logarithms in ``lses``, and in the result: 2 for states that come from FlashInfer.
        out_dtype: of the result: float32, float16 or bfloat16; ``None``: that of ``outs``.

    Returns:
        ``(out, lse)`` as from :func:`decode`.

    Raises:
        ValueError: no state is given, shapes, dtypes or devices differ, or base is not above 1.
        TypeError: an argument is no list of Tensors, or no number.
    """
    try:
        if not outs:  # nothing that the dispatcher could choose a backend by
            raise ValueError("merge_states: outs is empty; there must be at least one state")
        options = {} if (base, out_dtype) == (math.e, None) else {"base": base, "out_dtype": out_dtype}
        return call(_merge_states, outs, lses, **options)
    except Exception:
        refuse_wrong_types(
            "merge_states", _merge_states, (outs, lses), {"base": base, "out_dtype": out_dtype}
        )
        raise


@torch.library.register_fake(f"{NAMESPACE}::merge_states")
def _(outs, lses, *, base=math.e, out_dtype=None):
    return outs[0].new_empty(outs[0].shape, dtype=out_dtype), lses[0].new_empty(lses[0].shape)


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
    """Writes new keys and values at the end of each sequence, or where slots say, in place.

    They are rotated by their positions if asked, and quantised where only the caches are.

    Args:
        k_cache, v_cache, block_table, cache_batch_idx: as in :func:`decode`; changed in place. No expanded
            caches, and not one memory for both unless v is also k's memory (latent attention).
        k: ``[batch, tokens, num_kv_heads, head_dim]``, or ``[total, num_kv_heads, head_dim]`` with
            ``cu_seqlens``, in the cache's dtype. Quantised caches take float32, float16 and bfloat16 as well.
        v: the same, with a last dimension of ``head_dim_v``.
        seq_lens: ``[batch]`` int32 or int64, tokens in the cache before: new token ``i`` of sequence ``b``
            goes to position ``seq_lens[b] + i``. It is not changed; :func:`decode` wants it grown by the new
            tokens. Needed without ``slot_mapping``.
        cu_seqlens: ``[batch + 1]`` int32 or int64: sequence ``b`` has tokens ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1] - 1`` of packed k, v and q; it begins with 0.
        q: queries of the new tokens, with any number of heads: rotated in place, by the same positions.
        rotary_cos, rotary_sin: ``[max_position, rotary_dim / 2]``, in k's dtype or float32. The first
            ``rotary_dim`` dims of k (and q) are rotated, the others stay.
        rotary_interleaved: dims 2i and 2i + 1 are a pair (GPT-J), else i and i + rotary_dim / 2 (Llama).
        k_scale, v_scale: float32, in the shape of the caches without their last dimension, of any strides:
            changed in place, where quantised caches take tokens that are not; else ``None``. :func:`decode`
            takes them as they are.
        slot_mapping: ``[total]`` int64 or int32, for packed k and v: token ``t`` goes to slot
            ``slot_mapping[t] % block_size`` of block ``slot_mapping[t] // block_size``, as vLLM and SGLang
            have it; one of -1 is not written. It takes the place of ``seq_lens``, tables and ``cu_seqlens``,
            and knows no positions to rotate by.

    A row (a token and KV head, of K or V) is quantised by itself. Its scale is its largest magnitude divided
    by 127 (e4m3: 448, e5m2: 57344); what is stored are its elements divided by the scale and rounded to the
    nearest, ties to even; all in float32. The row is what a cache of k's dtype would hold: rotated, then
    rounded. A row of zeros, or so small that the scale underflows, has scale 0; one with NaN or infinity has
    scale NaN, and so is what attends to it. The bits are the same on all devices:
    :func:`lean_attention.reference.append_kv` has them.

    Under ``torch.autocast`` k and v, and q there and back, are cast to the dtype of the caches, which stay.
    Where the caches are quantised k stays too, and v and q are cast to its dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or stride; on a CPU also a token that
            would go outside the cache, before anything is written (on CUDA it is not written, and
            :func:`check_errors` tells of it), and two tokens that would go to one place of it (on CUDA nobody
            looks, and which of them stays is not defined).
        TypeError: an argument is no Tensor.
    """
    tensors = (
        k_cache,
        v_cache,
        k,
        v,
        seq_lens,
        block_table,
        cache_batch_idx,
        cu_seqlens,
        q,
        rotary_cos,
        rotary_sin,
    )
    try:
        _append_kv(
            *tensors,
            rotary_interleaved=rotary_interleaved,
            k_scale=k_scale,
            v_scale=v_scale,
            slot_mapping=slot_mapping,
        )
    except Exception:
        named = {"k_scale": k_scale, "v_scale": v_scale, "slot_mapping": slot_mapping}
        refuse_wrong_types("append_kv", _append_kv, tensors, named)
        raise


@torch.library.register_fake(f"{NAMESPACE}::append_kv")
def _(
    k_cache,
    v_cache,
    k,
    v,
    seq_lens=None,
    block_table=None,
    cache_batch_idx=None,
    cu_seqlens=None,
    q=None,
    *_rotary,
    k_scale=None,
    v_scale=None,
    **_options,
):
    _refuse_lost_offsets("append_kv", k_cache=k_cache, v_cache=v_cache, q=q, k_scale=k_scale, v_scale=v_scale)


def check_errors(device: torch.device | int | None = None) -> None:
    """Raises if a CUDA kernel has met a length or an index out of range since the last call.

    On a GPU lengths, block tables and slots are read by the kernels, without a synchronisation: a number out
    of range is brought into range, and the first one is kept. This waits for the device and tells of it. The
    CPU backend raises at once, so there this never raises.

    Args:
        device: one device; ``None``: every GPU.

    Raises:
        ValueError: names the argument, the sequence and the value.
    """
    if not torch.cuda.is_available() or not tools.has_cuda():
        return
    if device is None:
        indices = range(torch.cuda.device_count())
    else:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if chosen.type != "cuda":
            return
        indices = [torch.cuda.current_device() if chosen.index is None else chosen.index]
    for index in indices:
        with torch.cuda.device(index):
            message = tools.take_cuda_error(index)
        if message:
            raise ValueError(f"{message} [cuda:{index}]")


refuse_gradients("decode")
refuse_gradients("decode_fixed_split")
refuse_gradients("read_only")
refuse_gradients("merge_states")

_autocast.register()
