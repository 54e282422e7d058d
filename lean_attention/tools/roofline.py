"""The roofline of decoding on a CPU: how fast it reads memory, and multiplies.

Reads bound it once K and V leave the last-level cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lean_attention._core import tools


def read_bandwidth_of(memory: torch.Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second, by `clock`, of one read of a contiguous CPU tensor on all of torch's threads."""
    data = memory.view(-1).view(torch.uint8)
    nbytes = data.numel() // 64 * 64
    begin = clock()
    tools.read_loop(data)
    return nbytes / (clock() - begin)


def read_bandwidth(nbytes: int = 2**29, repeats: int = 9) -> float:
    """Bytes per second, the median of `repeats` reads of `nbytes` of fresh memory."""
    memory = torch.ones(nbytes, dtype=torch.uint8)
    read_bandwidth_of(memory)
    return sorted(read_bandwidth_of(memory) for _ in range(repeats))[repeats // 2]


def fma_rate(
    dtype: torch.dtype, rows: int = 1, seconds: float = 0.004, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Products a second, by `clock`, that all of torch's threads add up when they do nothing else.

    With the instructions that `decode` uses for caches of `dtype` (float32, float16, bfloat16) and `rows`
    query rows per KV head, from registers; its conversions, loads and softmax come on top. The loop is run
    for longer and longer, until it takes `seconds`: the shorter ones wake the threads.
    """
    name = str(dtype).removeprefix("torch.")
    rounds = 1000
    while True:
        begin = clock()
        products = tools.fma_loop(name, rounds, rows)
        took = clock() - begin
        if took >= seconds:
            return products / took
        rounds *= 2
