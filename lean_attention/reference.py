"""The definition of the ops, in float64 and plain PyTorch. Slow and meant to be read."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
) -> tuple[Tensor, Tensor]:
    """What `lean_attention.decode` computes. Shapes as there; results are float64.

    A score that is NaN or +inf makes its whole row NaN. With several query tokens, a NaN in a token that
    only some rows see may reach the other rows of that sequence.
    """
    batch, q_len, num_heads, head_dim = q.shape
    max_len, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(batch, q_len, num_heads, v_cache.shape[3], dtype=torch.float64)
    lse = q.new_full((batch, num_heads, q_len), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        seq_len = max_len if seq_lens is None else int(seq_lens[b])
        keys = k_cache[b, :seq_len].double().repeat_interleave(group, dim=1)  # token, head, dim
        values = v_cache[b, :seq_len].double().repeat_interleave(group, dim=1)
        for i in range(q_len):
            position = seq_len - q_len + i
            last = position if causal else seq_len if window_right < 0 else position + window_right
            first = 0 if window_left < 0 else max(0, position - window_left)
            seen = slice(first, max(first, min(seq_len, last + 1)))
            if seen.start >= seen.stop:
                continue
            scores = scale * torch.einsum("hd,thd->ht", q[b, i].double(), keys[seen])
            m = scores.amax(dim=1, keepdim=True)
            if (m == -torch.inf).all():
                continue
            weights = torch.exp(scores - m)
            l = weights.sum(dim=1)  # noqa: E741  (the paper's name)
            out[b, i] = torch.einsum("ht,thd->hd", weights, values[seen]) / l[:, None]
            lse[b, :, i] = m[:, 0] + torch.log(l)
    return out, lse


def merge_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What `lean_attention.merge_states` computes, in float64."""
    out = torch.stack(outs).double()  # state, batch, token, head, dim
    lse = torch.stack(lses).double()  # state, batch, head, token
    merged = torch.logsumexp(lse, dim=0)
    weights = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - merged)).transpose(-1, -2)[..., None]
    return torch.where(weights == 0, 0.0, weights * out).sum(dim=0), merged
