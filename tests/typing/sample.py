"""A program as users write it. `make lint` reads it with `mypy --strict`; nothing runs it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

import lean_attention
from lean_attention import Schedule, flash_attn_with_kvcache, reference
from lean_attention.integrations.transformers import LeanCache, accelerate
from lean_attention.tools.picture import draw_schedules


class DecodeAttention(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        q: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        caches: tuple[torch.Tensor, torch.Tensor],
        seq_lens: torch.Tensor,
    ) -> torch.Tensor:
        lean_attention.append_kv(*caches, *new, seq_lens)
        out, lse = lean_attention.decode(q, *caches, seq_lens + 1, scale=self.scale)
        merged, _ = lean_attention.merge_states([out, out], [lse, lse])
        definition, _ = reference.decode(q, *caches, seq_lens + 1)
        return merged + definition.to(out.dtype)


def hosts(seq_lens: list[int]) -> list[int]:
    schedule = Schedule(seq_lens, num_kv_heads=8, num_ctas=264)
    draw_schedules(schedule, Path("schedule.png"))
    return [segment.host for segment in schedule.segments() if segment.is_host]


def with_flash_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    out = flash_attn_with_kvcache(q, k_cache, v_cache, causal=True)
    return out if isinstance(out, torch.Tensor) else out[0]


def faster(model: PreTrainedModel) -> LeanCache:
    accelerate(model, kv_cache="int8")
    return LeanCache(model.config)


lean_attention.check_errors(0)
