"""What bounds decoding on a CPU: streaming reads, once K and V leave the last-level cache, and products."""

from __future__ import annotations

import time

import torch

from lean_attention._core import core


def read_seconds(memory: torch.Tensor) -> float:
    """Seconds to read a contiguous CPU tensor once on all of torch's threads."""
    nbytes = memory.numel() * memory.element_size() // 64 * 64
    begin = time.perf_counter()
    core.stream_read(memory.data_ptr(), nbytes)
    return time.perf_counter() - begin


def read_bandwidth(nbytes: int = 2**29, repeats: int = 9) -> float:
    """Bytes per second, the median of `repeats` reads of `nbytes` of fresh memory."""
    memory = torch.ones(nbytes, dtype=torch.uint8)
    read_seconds(memory)
    seconds = sorted(read_seconds(memory) for _ in range(repeats))
    return nbytes / seconds[repeats // 2]


def product_rate(dtype: torch.dtype, rounds: int = 100_000) -> float:
    """Products a second that all of torch's threads add up when they do nothing else.

    With the instructions that `decode` uses for caches of `dtype` (float32, float16, bfloat16), from
    registers; its conversions, loads and softmax come on top. `rounds` of some 16 instructions are timed.
    """
    name = str(dtype).removeprefix("torch.")
    core.multiply(name, rounds // 4)  # wakes the threads
    begin = time.perf_counter()
    products = core.multiply(name, rounds)
    return products / (time.perf_counter() - begin)
