"""What the ops do under torch.autocast.

`torch.library.register_autocast` casts all that is floating point: quantised caches, scales and sinks too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lean_attention._core import NAMESPACE, ops

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register() -> None:
    for device_type in _KEYS:
        _register("decode", _decode, device_type)
        _register("decode_out", _decode_out, device_type)
        _register("append_kv", _append_kv, device_type)


def _register(op_name: str, rule, device_type: str) -> None:
    key = _KEYS[device_type]

    def kernel(*args, **options):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return rule(torch.get_autocast_dtype(device_type), *args, **options)

    _library.impl(op_name, kernel, key.name)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In `dtype`, where both are dtypes that the ops compute in; caches may be quantised."""
    return tensor.to(dtype) if tensor is not None and {tensor.dtype, dtype}.issubset(_FLOATS) else tensor


# Scales, slopes, sinks and log-sum-exps stay float32. What is written keeps its dtype; the rest follows it.


def _decode(dtype, q, k_cache, v_cache, *tensors, **options):
    inputs = (_cast(tensor, dtype) for tensor in (q, k_cache, v_cache))
    return ops.decode.default(*inputs, *tensors, **options)


def _decode_out(_dtype, q, k_cache, v_cache, out, *tensors, **options):
    inputs = [q, k_cache, v_cache]
    floats = {tensor.dtype for tensor in inputs if tensor.dtype in _FLOATS}
    if len(floats) > 1 or out.dtype != torch.float32:  # which goes with any one dtype
        inputs = [_cast(tensor, out.dtype) for tensor in inputs]
    return ops.decode_out.default(*inputs, out, *tensors, **options)


def _append_kv(
    _dtype,
    k_cache,
    v_cache,
    k,
    v,
    seq_lens=None,
    block_table=None,
    cache_batch_idx=None,
    cu_seqlens=None,
    q=None,
    rotary_cos=None,
    rotary_sin=None,
    **options,
):
    dtype = k_cache.dtype if k_cache.dtype in _FLOATS else k.dtype  # quantised caches quantise what comes
    new = (_cast(tensor, dtype) for tensor in (k, v))
    rotated = _cast(q, dtype)
    # The op takes tables of this dtype, or of float32.
    tables = (
        t if t is None or t.dtype == dtype else _cast(t, torch.float32) for t in (rotary_cos, rotary_sin)
    )
    where = (seq_lens, block_table, cache_batch_idx, cu_seqlens)
    ops.append_kv.default(k_cache, v_cache, *new, *where, rotated, *tables, **options)
    if rotated is not q:
        q.copy_(rotated)
