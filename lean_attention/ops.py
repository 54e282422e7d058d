"""The public functions and what `torch.library` needs to know of the ops beyond their C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_attention._core import core  # noqa: F401  (loads the ops)


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
    scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    num_ctas: int = 0,
) -> tuple[Tensor, Tensor]:
    """Exact attention of a few query tokens over long KV caches, scheduled stream-K.

    Every CTA (on a CPU: every thread) reads an equal share of all caches, whatever the lengths, and the
    pieces of an output are merged in the same kernel (LeanAttention, arXiv 2405.10480, section 4).
    The definition of the result is :func:`lean_attention.reference.decode`.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]``, float16, bfloat16 or, on a CPU, float32. Query token
            ``i`` sits at position ``seq_len - q_len + i`` of its sequence: the new tokens are in the cache
            already.
        k_cache: ``[batch, max_len, num_kv_heads, head_dim]``, q's dtype and device. ``num_heads`` must be a
            multiple of ``num_kv_heads``: head ``h`` reads KV head ``h // (num_heads // num_kv_heads)``.
        v_cache: ``[batch, max_len, num_kv_heads, head_dim_v]``.
        seq_lens: ``[batch]`` int32 on q's device: tokens in use, the new ones included, from 0 to
            ``max_len``. What lies beyond is never read. ``None``: all ``max_len`` tokens.
        scale: factor of ``q @ k``; ``None``: ``head_dim ** -0.5``.
        causal: a query token sees no later position than its own. Rows before the start of the sequence
            (where ``q_len > seq_len``) see nothing.
        window_left, window_right: a token at position ``p`` sees ``p - window_left`` to
            ``p + window_right``; -1 is unbounded. Tokens that no row sees are not read.
        num_ctas: lean ranges to cut the work into; 0 lets the backend choose. The result depends on it in
            rounding only, and is bitwise the same for the same inputs and ``num_ctas``.
        block_table, cache_batch_idx, cache_leftpad, alibi_slopes, sinks, softcap: not yet supported;
            given, they raise.

    All tensors may have any strides as long as the last dimension is contiguous: a cache stored
    ``[batch, heads, tokens, dim]`` is passed as ``cache.transpose(1, 2)``, without a copy. ``head_dim`` and
    ``head_dim_v`` are multiples of 8 up to 256 and may differ.

    Returns:
        ``(out, lse)``: ``out`` is ``[batch, q_len, num_heads, head_dim_v]`` in q's dtype; ``lse`` is
        ``[batch, num_heads, q_len]``, float32, the natural log-sum-exp of each row's scaled scores. A row
        that sees nothing gives zeros and ``-inf``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, stride or value; on a CPU also a
            length out of range (on CUDA, where lengths are not looked at before the launch, it is clamped).
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
    )
    options = {
        name: value
        for name, value, default in (
            ("scale", scale, None),
            ("causal", causal, True),
            ("window_left", window_left, -1),
            ("window_right", window_right, -1),
            ("softcap", softcap, 0.0),
            ("num_ctas", num_ctas, 0),
        )
        if value != default
    }
    return _call(torch.ops.lean_attn.decode.default, *tensors, **options)


def _call(op, *tensors, **options):
    """Calls an op, and where no gradient can be asked for, without PyTorch's Python layer for gradients.

    That layer, which makes a gradient raise, takes longer than a short decode.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return op(*tensors, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*tensors, **options)


# decode_fixed_split is decode by FlashAttention-2's and FlashDecoding's schedules, for benchmarks only.
@torch.library.register_fake("lean_attn::decode_fixed_split")
@torch.library.register_fake("lean_attn::decode")
def _fake_decode(q, k_cache, v_cache, seq_lens=None, block_table=None, **_options):
    # The kernel checks everything; these are the mistakes that would make nonsense of a trace.
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        torch._check_value(
            tensor.dim() == 4,
            lambda name=name, tensor=tensor: (
                f"decode: {name} has shape {list(tensor.shape)}; it must have 4 dimensions"
            ),
        )
        torch._check_value(
            tensor.device == q.device,
            lambda name=name, tensor=tensor: (
                f"decode: {name} is on {tensor.device}, q on {q.device}; they must be on the same device"
            ),
        )
    batch, q_len, num_heads, _head_dim = q.shape
    out = q.new_empty(batch, q_len, num_heads, v_cache.shape[3])
    lse = q.new_empty(batch, num_heads, q_len, dtype=torch.float32)
    return out, lse


def merge_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint sets of tokens into attention over their union.

    Args:
        outs: partial outputs, each ``[batch, q_len, num_heads, head_dim_v]``.
        lses: their natural log-sum-exps, each ``[batch, num_heads, q_len]``, float32. A state of ``-inf``
            (nothing seen) weighs nothing, whatever its output holds.

    Returns:
        ``(out, lse)`` as from :func:`decode`.

    Raises:
        ValueError: no state is given, or shapes, dtypes or devices differ.
    """
    if not outs:  # nothing that the dispatcher could choose a backend by
        raise ValueError("merge_states: outs is empty; there must be at least one state")
    return _call(torch.ops.lean_attn.merge_states.default, outs, lses)


@torch.library.register_fake("lean_attn::merge_states")
def _(outs, lses):
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _no_gradient(op_name: str):
    def backward(_ctx, *_grads):
        raise RuntimeError(
            f"lean_attention.{op_name} has no gradient: it is for inference. "
            "Call it under torch.no_grad() or torch.inference_mode(), or train with another attention."
        )

    torch.library.register_autograd(f"lean_attn::{op_name}", backward)


_no_gradient("decode")
_no_gradient("decode_fixed_split")
_no_gradient("merge_states")
