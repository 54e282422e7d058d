"""Whether the op or transformers' sdpa is faster for a step of many query tokens on this machine.

Both take a time of ``a + b * q_len * tokens``, near enough. One short measurement for each dtype and shape of
a head finds a and b of both: a tenth of a second, before the first prompt. The processors measured differ in
how fast they multiply 16-bit numbers, and so does what the two make of it.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lean_attention

# Query tokens of the two steps measured, on a cache of twice as many tokens.
SHORT, LONG = 128, 1024


def op_is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """For a step with these shapes; `query` is ``[batch, heads, q_len, head_dim]``, the others likewise.

    Always False on a GPU, where the op is made for few query tokens, and while compiling.
    """
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if not query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled("cpu"):
        return False
    group = query.shape[1] // key.shape[1]
    op, sdpa = _times(query.dtype, group, query.shape[-1], value.shape[-1], torch.get_num_threads())
    work = query.shape[2] * key.shape[2]
    return op(work) < sdpa(work)


@functools.lru_cache(maxsize=64)
def _times(
    dtype: torch.dtype, group: int, head_dim: int, head_dim_v: int, threads: int
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Seconds of the op and of sdpa for ``q_len * tokens``, by measurement with one KV head."""
    module = types.SimpleNamespace(num_key_value_groups=group, is_causal=True, training=False)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    works, seconds = [], {"op": [], "sdpa": []}
    with torch.inference_mode():
        for q_len in (SHORT, LONG):
            q = torch.zeros(1, group, q_len, head_dim, dtype=dtype)
            k = torch.zeros(1, 1, 2 * q_len, head_dim, dtype=dtype)
            v = torch.zeros(1, 1, 2 * q_len, head_dim_v, dtype=dtype)
            works.append(q_len * k.shape[2])
            q_first, k_first, v_first = (x.transpose(1, 2) for x in (q, k, v))
            runs = {
                "op": lambda q=q_first, k=k_first, v=v_first: lean_attention.decode(q, k, v, causal=False),
                "sdpa": lambda q=q, k=k, v=v: sdpa(module, q, k, v, None, is_causal=False),
            }
            best = dict.fromkeys(runs, float("inf"))
            for _ in range(3):  # in turn, so that a busy machine disturbs both alike
                for name, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    best[name] = min(best[name], time.perf_counter() - begin)
            for name, shortest in best.items():
                seconds[name].append(shortest)
    return _line(works, seconds["op"]), _line(works, seconds["sdpa"])


def _line(works: list[int], seconds: list[float]) -> Callable[[int], float]:
    slope = max(seconds[1] - seconds[0], 0.0) / (works[1] - works[0])
    return lambda work: max(seconds[0] + slope * (work - works[0]), 0.0)
