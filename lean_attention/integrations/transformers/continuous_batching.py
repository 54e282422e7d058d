"""Continuous batching (``model.generate_batch``): the pages are read where they lie.

transformers gathers the visible tokens of all requests, at every step and layer. Up to 5.23 its attention
functions do, and are given the cache. From 5.24 on the models call the cache's ``update`` themselves, and an
attention function gets gathered keys. There `register` puts a function of its own in the place of ``update``:
for this attention it writes the new tokens and hands the cache on, with the keys.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

import lean_attention
from lean_attention.integrations.transformers.options import PAGED_OPTIONS, special_options, why_not

# What continuous batching calls its attention without flash-attn; it takes no name that it does not know.
PAGED_NAME = "paged|eager"

DOCS = "docs/transformers.md"

# Set on a cache for which huge pages were asked for.
_ASKED = "_lean_attention_huge_pages"

_logger = logging.get_logger("lean_attention.transformers")
_transformers_update = PagedAttentionCache.update
# Configs of models in which some layer does not get its keys as the cache gave them.
_gathering: list[weakref.ref] = []


@dataclass(frozen=True)
class _Written:
    """New tokens of a layer that are in its cache: what its attention needs to read them there.

    From transformers 5.24 on it travels as an attribute of the keys, so that a layer that transforms them,
    and could not be given tokens from the cache, does not find it; and layers that share them do.
    """

    cache: PagedAttentionCache
    layer: int
    value: Tensor
    gathered: bool  # key and value hold the visible tokens of all sequences, laid end to end


def register() -> None:
    """Gives continuous batching's attention without flash-attn to this package."""
    AttentionInterface.register(PAGED_NAME, paged_attention)
    # The release that renamed this parameter is the one from which on models call the paged cache.
    if "cache" in inspect.signature(create_causal_mask).parameters:
        PagedAttentionCache.update = _update


@torch.compiler.disable  # as transformers' own: the cache is written in place, through views of one tensor
def _update(
    self: PagedAttentionCache, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict
) -> tuple[Tensor, Tensor]:
    """`PagedAttentionCache.update` that gathers only what this package's attention cannot read in place.

    A layer's first step is always gathered (nothing in it is old): it shows whether the layer's attention
    gets the keys as they are returned here.
    """
    if self.config._attn_implementation != PAGED_NAME or kwargs.get("block_table") is not None:
        return _transformers_update(self, key_states, value_states, layer_idx, kwargs)
    in_place = layer_idx in _layers_in_place(self) and not any(c() is self.config for c in _gathering)
    if in_place:
        key_states, value_states, gathered = _write(self, key_states, value_states, layer_idx, kwargs)
    else:
        gathered = True
        key_states, value_states = _transformers_update(self, key_states, value_states, layer_idx, kwargs)
    key_states._lean_attention_written = _Written(self, layer_idx, value_states, gathered)
    return key_states, value_states


def _layers_in_place(cache: PagedAttentionCache) -> set[int]:
    """The layers whose attention is known to get what `_update` returns."""
    return cache.__dict__.setdefault("_lean_attention_layers", set())


def _write(
    cache: PagedAttentionCache, key: Tensor, value: Tensor, layer: int, kwargs: dict
) -> tuple[Tensor, Tensor, bool]:
    """Writes new tokens; returns keys and values, and whether transformers had to gather the old ones."""
    allocator = cache.layer_to_allocator[layer]
    reads = kwargs["read_index"][allocator.index]
    # A ring buffer can be read after it is written where a sequence's only new token replaces the one that
    # has left its window.
    single = key.shape[2] == kwargs["cu_seq_lens_q"].numel() - 1
    if reads.numel() == 0 or not (allocator.supports_block_table or single):
        return *_transformers_update(cache, key, value, layer, dict(kwargs)), True
    indices = list(kwargs["read_index"])
    indices[allocator.index] = reads[:0]
    _transformers_update(cache, key, value, layer, {**kwargs, "read_index": indices})
    return key, value, False


@torch.compiler.disable
def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """A step of continuous batching: new tokens of all requests, packed, ``[1, heads, tokens, dim]``."""
    special = special_options(kwargs) - PAGED_OPTIONS
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    reason = why_not(query, key, value, dropout, special, sinks)
    cache, written = kwargs.pop("cache", None), getattr(key, "_lean_attention_written", None)
    if written is not None and written.value is not value:
        written = None
    if reason is None and cache is not None:  # up to 5.23
        key, value, gathered = _write(cache, key, value, module.layer_idx, kwargs)
        written = _Written(cache, module.layer_idx, value, gathered)
    elif reason is None and written is not None:
        _layers_in_place(written.cache).add(written.layer)
    elif written is None and cache is None:
        if not any(config() is module.config for config in _gathering):
            _gathering.append(weakref.ref(module.config))
        _logger.warning_once(
            f"lean_attention: {type(module).__name__} of transformers {transformers.__version__} does not "
            f"hand its paged cache on, so that all tokens are copied at every step: see {DOCS}"
        )
        reason = reason or "no paged cache is given"
    if reason is not None:
        return _leave(
            module, query, key, value, attention_mask, scaling, reason, special, cache, written, kwargs
        )
    allocator = written.cache.layer_to_allocator[written.layer]
    ends = _of_layer(kwargs["cu_seq_lens_k"], allocator).int()
    longest = _of_layer(kwargs["max_length_k"], allocator)
    begins = ends[:-1, None]
    window_left = -1
    if written.gathered:
        k_cache, v_cache = (x[0].transpose(0, 1)[:, None] for x in (key, value))
        block_table = begins + torch.arange(longest, device=key.device)
        if (window := kwargs.get("sliding_window")) is not None:
            window_left = window - 1
    elif allocator.supports_block_table:
        k_cache, v_cache = allocator.get_cache_for_block_table(written.layer)
        block_size = k_cache.shape[1]
        reads = kwargs["read_index"][allocator.index]
        first_tokens = begins + torch.arange(0, longest, block_size, device=reads.device)
        block_table = reads[first_tokens.clamp(max=reads.numel() - 1)] // block_size
    else:
        views = allocator._kv_token_views[written.layer]  # from different offsets to the same end
        k_cache, v_cache = (view[: min(map(len, views)), None] for view in views)
        reads = kwargs["read_index"][allocator.index][: int(ends[-1])]
        new = reads == allocator.sentinel_index
        slots = reads.masked_scatter(new, kwargs["write_index"][allocator.index][: int(new.sum())])
        tokens = begins + torch.arange(longest, device=reads.device)
        block_table = slots[tokens.clamp(max=slots.numel() - 1)]
    if not written.gathered and _ASKED not in written.cache.__dict__:
        written.cache.__dict__[_ASKED] = True
        lean_attention.use_huge_pages(k_cache)  # all layers are in one tensor
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
        sinks=None if sinks is None else sinks.float(),
    )
    return out[None], None


def _of_layer(value, allocator):
    """transformers gives one for each type of layer, and its cache puts the layer's own in their place."""
    return value[allocator.layer_type] if isinstance(value, dict) else value


def _leave(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    reason: str,
    special: set[str],
    cache: PagedAttentionCache | None,
    written: _Written | None,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    """Leaves a step to transformers' own attention, which has sinks of the module's, and no other option."""
    if lost := sorted(special - {"s_aux"}):
        raise ValueError(
            f"lean_attention: continuous batching cannot run {type(module).__name__}: {reason}; "
            f"transformers' own attention would ignore its {', '.join(lost)}. Use model.generate"
        )
    _logger.warning_once(f"lean_attention: continuous batching is left to transformers: {reason}")
    if written is not None and not written.gathered:
        key, value = _transformers_update(written.cache, key, value, written.layer, dict(kwargs))
    if cache is not None:
        kwargs["cache"] = cache
    return eager_paged_attention_forward(module, query, key, value, mask, scaling, **kwargs)
