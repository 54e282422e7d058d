"""Families that attend to tokens of their own choice: the choice as a mask.

DeepSeek V3.2, GLM-MoE-DSA and others choose tokens for each query (``indices``), MiniMax M3 blocks of tokens
for each head (``block_indices``). For "eager" and "sdpa" these families make masks of it; to any other name
they pass the choice as an option, and a mask that does not know of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lean_attention.integrations.transformers.masks import plain_causal

SELECTIONS = frozenset({"indices", "block_indices"})


def with_selection(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    options: dict,
    special: set[str],
    causal: bool,
) -> tuple[Tensor | None, set[str]]:
    """The mask with a family's choice of tokens in it, and the options that are then left to honour.

    Args:
        special: names of the options that are set and change the result.
        causal: the layer is one of a decoder.
    """
    q_len, tokens = query.shape[2], key.shape[2]
    indices = options.get("indices")
    if indices is not None and indices.dim() == 3:  # [batch, q_len, chosen]
        chosen = torch.zeros(*indices.shape[:2], tokens, dtype=torch.bool, device=query.device)
        chosen = chosen.scatter(-1, indices.long(), True)[:, None]
        if mask is None and causal and q_len > 1:
            mask = plain_causal(q_len, tokens, query.device)
        if mask is None:
            mask = chosen
        elif mask.dtype == torch.bool:
            mask = mask[..., :tokens] & chosen
        else:
            mask = mask[..., :tokens].masked_fill(~chosen, torch.finfo(mask.dtype).min)
        special = special - {"indices"}
    blocks = options.get("block_indices")
    make_mask = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if blocks is not None and make_mask is not None:
        positions = options.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens - q_len, tokens, device=query.device)
        positions = (positions if positions.dim() > 1 else positions[None]).expand(query.shape[0], -1)
        mask = make_mask(blocks, mask, tokens, query.dtype, query.device, positions)
        special = special - {"block_indices"}
    return mask, special
