"""This package, and its baseline schedules on the same tile kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import lean_attention
from benchmarks.harness import MAX_ERROR, MAX_FP8_ERROR, OURS, Case, Inputs


class LeanAttention:
    """`decode`, on the case's own caches, or on int8 (a scale a row) or fp8 (e4m3, unscaled) of them."""

    def __init__(self, cache_dtype: str = "") -> None:
        self.cache_dtype = cache_dtype
        self.name = f"{OURS}-{cache_dtype}" if cache_dtype else OURS
        self.max_error = MAX_FP8_ERROR if cache_dtype == "fp8" else MAX_ERROR

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        k, v, scales = inputs.k_cache, inputs.v_cache, {}
        if self.cache_dtype == "fp8":
            k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        elif self.cache_dtype == "int8":
            (k, k_scale), (v, v_scale) = rows_of_int8(k), rows_of_int8(v)
            scales = {"k_scale": k_scale, "v_scale": v_scale}
        return lambda: lean_attention.decode(inputs.q, k, v, inputs.seq_lens, **scales)[0]


def rows_of_int8(cache: Tensor) -> tuple[Tensor, Tensor]:
    """A cache's rows as int8, and the scale of each; in the layout of the cache."""
    rows = cache.float().nan_to_num()
    scale = rows.abs().amax(-1) / 127
    return (rows / scale.unsqueeze(-1)).round().to(torch.int8), scale


class FixedSplit:
    """FlashAttention-2's split by batch and head (1) or FlashDecoding's (more), on our tile kernels."""

    def __init__(self, splits: int) -> None:
        self.splits = splits
        self.name = "head-split" if splits == 1 else f"split-{splits}"

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        op = torch.ops.lean_attn.decode_fixed_split.default
        return lambda: op(inputs.q, inputs.k_cache, inputs.v_cache, inputs.seq_lens, splits=self.splits)[0]
