"""Options of transformers' attention interface, and what keeps a step from the op."""

from __future__ import annotations

import torch
from torch import Tensor

# Options that change nothing in any family's own eager attention, because the mask says it too or because
# others read them. `python -m benchmarks.transformers_families` checks it against what families pass.
KNOWN_OPTIONS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "seq_idx",
        "sliding_window",
        "use_cache",
    }
)
# What a step of continuous batching passes besides.
PAGED_OPTIONS = frozenset(
    {"block_table", "cache", "logits_indices", "logits_processor_args", "read_index", "write_index"}
)
# Changes of the scores that the op has a parameter for.
SCORE_OPTIONS = frozenset({"softcap", "s_aux"})


def special_options(options: dict) -> set[str]:
    """The names of options that are set and may change the result."""
    given = {name for name, option in options.items() if option is not None and option is not False}
    return given - KNOWN_OPTIONS


def why_not(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, special: set[str], sinks: Tensor | None
) -> str | None:
    """Why a step cannot go to the op, as far as shapes, dtypes and options tell.

    A reason holds nothing that changes from step to step: it is said once.
    """
    unknown = sorted(special - SCORE_OPTIONS)
    if unknown:
        return f"the option {' and '.join(unknown)}, which this package does not know"
    if dropout:
        return "dropout"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are asked for"
    if sinks is not None and sinks.shape != query.shape[1:2]:
        return "attention sinks that are not one per head"
    cast = torch.is_autocast_enabled(query.device.type)
    dtypes = {query.dtype, key.dtype, value.dtype}
    if not dtypes <= {torch.float32, torch.float16, torch.bfloat16} or (len(dtypes) > 1 and not cast):
        return f"query, key and value of {', '.join(sorted(map(str, dtypes)))}"
    if query.is_cuda and query.dtype == torch.float32 and not cast:
        return "float32 on a GPU"
    for dim in (query.shape[-1], value.shape[-1]):
        if dim % 8 or dim > 512 or dim == 0:
            return f"a head_dim of {dim}"
    return None
