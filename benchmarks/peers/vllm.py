"""vLLM's attention for CPUs, as its backend calls it: the cache in pages, in the layout that it chooses."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness import MAX_ERROR, MAX_FP8_ERROR, NOT_INSTALLED, Case, Inputs, Unavailable

# The page that vLLM takes on a CPU unless it is told otherwise.
PAGE = 128


def import_vllm() -> tuple[ModuleType, ModuleType]:
    """Its ops, and its backend for CPUs."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import _custom_ops
        from vllm.v1.attention.backends import cpu_attn
    except ModuleNotFoundError as error:
        raise Unavailable(NOT_INSTALLED) from error
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise Unavailable("the vLLM that is installed has no attention for CPUs")
    return _custom_ops, cpu_attn


class Vllm:
    """cpu_attention_with_kv_cache. The plan of a step, which vLLM makes once for all layers, is not timed."""

    def __init__(self, cache_dtype: str = "auto") -> None:
        self.cache_dtype = cache_dtype
        self.name = "vllm" if cache_dtype == "auto" else f"vllm-{cache_dtype}"
        self.max_error = MAX_ERROR if cache_dtype == "auto" else MAX_FP8_ERROR

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        ops, cpu_attn = import_vllm()
        sizes = cpu_attn.CPUAttentionBackend.get_supported_head_sizes()
        if case.head_dim not in sizes:
            raise Unavailable(f"no kernel for a head_dim of {case.head_dim}")
        isa = cpu_attn._get_attn_isa(case.dtype, PAGE, case.head_dim, self.cache_dtype)
        # The kernel uses the registers without asking the system for them, which ends a process.
        if isa == "amx" and not torch.cpu._init_amx():
            raise Unavailable("the system does not give AMX to this process")
        batch = len(case.lens)
        pages = [-(-length // PAGE) for length in case.lens]
        table = torch.zeros(batch, max(pages), dtype=torch.int32)
        dtype = case.dtype if self.cache_dtype == "auto" else torch.uint8
        cache = torch.zeros(sum(pages), case.kv_heads, 2 * PAGE, case.head_dim, dtype=dtype)
        k_cache, v_cache = cache.chunk(2, dim=2)
        first = 0
        for b, length in enumerate(case.lens):
            table[b, : pages[b]] = torch.arange(first, first + pages[b])
            slots = torch.arange(first * PAGE, first * PAGE + length)
            ops.cpu_attn_reshape_and_cache(
                inputs.k_cache[b, :length].contiguous(),
                inputs.v_cache[b, :length].contiguous(),
                k_cache,
                v_cache,
                slots,
                isa,
                kv_cache_dtype=self.cache_dtype,
            )
            first += pages[b]
        starts = torch.arange(batch + 1, dtype=torch.int32)
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch,
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            seq_lens=inputs.seq_lens,
            dtype=case.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
            kv_cache_dtype=self.cache_dtype,
        )
        q = inputs.q.view(batch, case.heads, case.head_dim)
        out = torch.empty_like(q)

        def call() -> Tensor:
            ops.cpu_attention_with_kv_cache(
                query=q,
                key_cache=k_cache,
                value_cache=v_cache,
                output=out,
                query_start_loc=starts,
                seq_lens=inputs.seq_lens,
                scale=case.head_dim**-0.5,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=table,
                softcap=0.0,
                scheduler_metadata=plan,
                s_aux=None,
                kv_cache_dtype=self.cache_dtype,
            )
            return out.unsqueeze(1)

        if isa == "amx":
            call.note = f"with AMX in {str(case.dtype).removeprefix('torch.')}"
        return call
