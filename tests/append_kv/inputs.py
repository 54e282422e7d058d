"""Arguments of append_kv, and what calls with them are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_attention import reference
from tests.backends import Backend


def make_arguments(dtype, paged: bool, tokens: int, rotary: str, dims=(64, 40)) -> dict:
    batch, heads, kv_heads, block_size = 3, 6, 2, 5
    lens = torch.tensor([13, 0, 7], dtype=torch.int32)
    made: dict = {"seq_lens": lens}
    if paged:
        blocks, slots = 16, block_size
        made["block_table"] = torch.randperm(blocks, dtype=torch.int32)[: batch * 5].view(batch, 5)
    else:
        blocks, slots = 4, 25
        made["cache_batch_idx"] = torch.randperm(blocks, dtype=torch.int32)[:batch]
    for name, dim in zip(("k", "v"), dims, strict=True):
        # Heads before tokens, with a gap after each row: both must stay as they are.
        pool = torch.randn(blocks, kv_heads, slots, dim + 8).to(dtype)
        made[name + "_cache"] = pool.transpose(1, 2)[..., :dim]
        made[name] = torch.randn(batch, tokens, kv_heads, dim).to(dtype)
    if rotary:
        rotary_dim = {"half": 64, "interleaved": 64, "partial": 24}[rotary]
        angles = torch.rand(30, rotary_dim // 2) * 6
        made["rotary_cos"], made["rotary_sin"] = angles.cos(), angles.sin()
        made["rotary_interleaved"] = rotary != "half"
        made["q"] = torch.randn(batch, tokens, heads, dims[0]).to(dtype)
    return made


def clones(arguments: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def pack(arguments: dict) -> dict:
    """What was in sequences of one length; q stays a view, which is written."""
    tokens = arguments["k"].shape[1]
    packed = {name: arguments[name].flatten(0, 1) for name in ("k", "v", "q") if name in arguments}
    return {**arguments, **packed, "cu_seqlens": torch.arange(4, dtype=torch.int32) * tokens}


def check(backend: Backend, arguments: dict, tolerance: float, packed: bool = False) -> None:
    want = clones(arguments)
    reference.append_kv(**want)
    backend.append_kv(**(pack(arguments) if packed else arguments))
    for name in {"k_cache", "v_cache", "q"} & arguments.keys():
        torch.testing.assert_close(arguments[name], want[name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(arguments["v_cache"], want["v_cache"], rtol=0, atol=0)


def with_quantised_caches(arguments: dict, dtype: torch.dtype) -> dict:
    """The caches as `dtype`, in their layout, and scales in another one."""
    made = dict(arguments)
    for name in ("k", "v"):
        cache = arguments[name + "_cache"]
        heads_first = torch.randint(256, (*cache.transpose(1, 2).shape[:3], cache.shape[3] + 8)).byte()
        made[name + "_cache"] = heads_first.view(dtype).transpose(1, 2)[..., : cache.shape[3]]
        made[name + "_scale"] = torch.rand(cache.shape[2], *cache.shape[:2]).movedim(0, 2)
    return made


def to_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int32)


def check_bits(backend: Backend, arguments: dict, packed: bool = False, name: str = "") -> None:
    """Of the caches and scales, all of them: what no token goes to stays."""
    want = clones(arguments)
    reference.append_kv(**want)
    backend.append_kv(**(pack(arguments) if packed else arguments))
    for tensor in ("k_scale", "v_scale", "k_cache", "v_cache"):
        wrong = (to_bits(arguments[tensor]) != to_bits(want[tensor])).nonzero()
        assert len(wrong) == 0, f"{name} {tensor}{wrong[0].tolist()}, and {len(wrong) - 1} more"
