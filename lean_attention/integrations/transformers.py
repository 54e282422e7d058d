"""Hugging Face transformers: ``attn_implementation="lean_attention"``.

    from lean_attention.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lean_attention")

Steps of few query tokens (decoding, speculation) go to :func:`lean_attention.decode`, longer ones (prefill)
to another implementation. The masks that transformers makes are turned into lengths, left padding and
windows, and compared with what these mean, element by element: a mask that they cannot say goes to the other
implementation too, and a warning says so once.

Continuous batching (``model.generate_batch``) runs through this package under the name that transformers
admits there, ``"paged|eager"``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lean_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import logging
except ImportError as error:  # no transformers, or one from before 4.53
    raise ImportError(
        "lean_attention.integrations.transformers needs transformers 4.53 or newer (pip install transformers)"
    ) from error

try:
    import transformers.generation.continuous_batching.cache_allocators  # noqa: F401
    from transformers.integrations.eager_paged import eager_paged_attention_forward

    HAS_PAGED_CACHE = True
except ImportError:  # before 5.19 the cache is another
    HAS_PAGED_CACHE = False

NAME = "lean_attention"

# What continuous batching calls its attention without flash-attn; it takes no name that it does not know.
PAGED_NAME = "paged|eager"

# Query tokens from which on a step counts as prefill: there it is products that take the time, not the cache.
MAX_QUERY_TOKENS = 32

_logger = logging.get_logger(__name__)
_prefill = "sdpa"


def register(prefill: str = "sdpa") -> None:
    """Makes ``attn_implementation="lean_attention"`` known to transformers; calling it again is harmless.

    From transformers 5.19 on the attention of continuous batching, ``"paged|eager"``, becomes this package's
    too: it reads the pages where they lie, which transformers' own gathers first.

    Args:
        prefill: the attention implementation for steps of many query tokens, one of transformers' own names.
            Soft-capped scores and attention sinks, which transformers' "sdpa" does not have, are left to
            this package for steps of any length.

    Raises:
        ValueError: transformers knows no implementation of that name.
    """
    global _prefill
    if prefill == NAME or prefill not in ALL_ATTENTION_FUNCTIONS:
        known = ", ".join(sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name != NAME))
        raise ValueError(f"register: prefill is {prefill!r}; it must be one of {known}")
    _prefill = prefill
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if HAS_PAGED_CACHE:
        AttentionInterface.register(PAGED_NAME, _paged_attention)


@dataclass(frozen=True)
class Visible:
    """What a mask means in the terms of `lean_attention.decode`."""

    seq_lens: Tensor  # [batch] int32
    leftpad: Tensor  # [batch] int32
    window_left: int


def visible_tokens(mask: Tensor, sliding_window: int | None = None) -> Visible | None:
    """Lengths, padding and window that say exactly what a mask says, or None where none do.

    Args:
        mask: bool, ``[batch, 1, q_len, tokens]``.
        sliding_window: tokens that the layer sees of the mask at most. Needed only where the mask cannot be
            looked at, which is while compiling.
    """
    if torch.compiler.is_compiling():
        return _visible_tokens(mask, sliding_window)
    known = getattr(mask, "_lean_attention_visible", None)  # a step's layers share the mask
    if known is None:
        known = (_visible_tokens(mask, sliding_window),)
        mask._lean_attention_visible = known
    return known[0]


def _visible_tokens(mask: Tensor, sliding_window: int | None) -> Visible | None:
    rows = mask[:, 0]
    q_len, tokens = rows.shape[1:]
    token = torch.arange(tokens, device=mask.device)
    last = rows[:, -1]
    seq_lens = torch.where(last, token + 1, 0).amax(dim=1)
    begin_of_last = torch.where(last, token, tokens).amin(dim=1)
    leftpad = torch.where(rows.any(dim=1), token, tokens).amin(dim=1)
    window_left = -1
    if q_len > 1 and torch.compiler.is_compiling():
        window_left = sliding_window - 1 if sliding_window is not None else -1
    elif q_len > 1:  # where the last row begins later than others there is a window
        moves = begin_of_last > leftpad
        if bool(moves.any()):
            window_left = int((seq_lens - 1 - begin_of_last)[moves].max())
    position = (seq_lens[:, None] - q_len + torch.arange(q_len, device=mask.device))[..., None]
    said = (token >= leftpad[:, None, None]) & (token <= position)
    if window_left >= 0:
        said &= token >= position - window_left
    same = (said == rows).all()
    if torch.compiler.is_compiling():
        # Nothing here may depend on the mask's contents; what cannot be said stops the program.
        torch._assert_async(
            same, "lean_attention: an attention mask with holes; use attn_implementation='sdpa'"
        )
    elif not bool(same):
        return None
    return Visible(seq_lens.int(), leftpad.clamp(max=tokens).int(), window_left)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key and value are ``[batch, heads, tokens, dim]``."""
    q_len = query.shape[2]
    changed = softcap is not None or s_aux is not None  # what "sdpa" would ignore or refuse
    reason = _why_not(query, key, value, attention_mask, dropout, kwargs)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    visible = None
    if reason is None and attention_mask is not None and (changed or q_len <= MAX_QUERY_TOKENS):
        visible = visible_tokens(attention_mask, kwargs.get("sliding_window"))
        if visible is None:
            reason = "an attention mask that is not lengths, left padding and one window"
    # Without a mask every token is seen; by more than one query token, in their order, as a prefill means it.
    plain_prefill = attention_mask is None and q_len > 1
    takes = q_len <= MAX_QUERY_TOKENS and not plain_prefill
    if reason is not None or not (takes or changed):
        if reason is not None and changed:
            raise ValueError(f"lean_attention: softcap and sinks cannot be left to {_prefill!r}: {reason}")
        if reason is not None and takes:
            _logger.warning_once(f"lean_attention: some steps are left to {_prefill!r}: {reason}")
        return ALL_ATTENTION_FUNCTIONS[_prefill](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if plain_prefill and causal:
        key, value = key[:, :, :q_len], value[:, :, :q_len]  # an empty static cache is longer
    out, _ = lean_attention.decode(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None if visible is None else visible.seq_lens,
        cache_leftpad=None if visible is None else visible.leftpad,
        window_left=-1 if visible is None else visible.window_left,
        causal=visible is not None or (plain_prefill and causal),
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return out, None


@torch.compiler.disable  # as transformers' own: the cache is written in place, through views of one tensor
def _paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """A step of continuous batching: new tokens of all requests, packed, ``[1, heads, tokens, dim]``."""
    cache = kwargs.get("cache")
    reason = "no paged cache is given"
    if cache is not None:
        reason = _why_not(query, key, value, None, dropout, {**kwargs, "cache": None})
    if reason is not None:
        _logger.warning_once(f"lean_attention: continuous batching is left to transformers: {reason}")
        options = {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window, **kwargs}
        return eager_paged_attention_forward(module, query, key, value, attention_mask, scaling, **options)
    layer = module.layer_idx
    allocator = cache.layer_to_allocator[layer]
    ends = kwargs["cu_seq_lens_k"][allocator.layer_type].int()
    begins, longest = ends[:-1, None], kwargs["max_length_k"][allocator.layer_type]
    reads = kwargs["read_index"][allocator.index]
    if allocator.supports_block_table and reads.numel() > 0:
        # All visible tokens are in the cache once the new ones are: nothing is gathered.
        indices = list(kwargs["read_index"])
        indices[allocator.index] = reads[:0]
        cache.update(key, value, layer, {**kwargs, "read_index": indices})
        k_cache, v_cache = allocator.get_cache_for_block_table(layer)
        block_size = k_cache.shape[1]
        first_tokens = begins + torch.arange(0, longest, block_size, device=reads.device)
        block_table = reads[first_tokens.clamp(max=reads.numel() - 1)] // block_size
        window_left = -1
    else:
        # A ring buffer, or no token in the cache yet: transformers lays the sequences end to end.
        key, value = cache.update(key, value, layer, dict(kwargs))
        k_cache, v_cache = (x[0].transpose(0, 1)[:, None] for x in (key, value))
        block_table = begins + torch.arange(longest, device=key.device)
        window_left = sliding_window - 1 if sliding_window is not None else -1
    out, _ = lean_attention.decode(
        query[0].transpose(0, 1),
        k_cache,
        v_cache,
        ends.diff(),
        block_table.int(),
        cu_seqlens_q=kwargs["cu_seq_lens_q"].int(),
        window_left=window_left,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return out[None], None


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, options: dict
) -> str | None:
    """Why a step cannot go to the op, as far as shapes, dtypes and options tell."""
    if dropout:
        return "dropout"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are asked for"
    if options.get("position_bias") is not None:
        return "a learned position bias"
    if options.get("cache") is not None:
        return "a paged cache"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1):
        return f"an attention mask of {mask.dtype} and shape {list(mask.shape)}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or key.dtype != query.dtype:
        return f"queries of {query.dtype} and keys of {key.dtype}"
    if query.is_cuda and query.dtype == torch.float32:
        return "float32 on a GPU"
    for dim in (query.shape[-1], value.shape[-1]):
        if dim % 8 or dim > 512 or dim == 0:
            return f"a head_dim of {dim}"
    return None
