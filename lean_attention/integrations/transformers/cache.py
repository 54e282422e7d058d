"""A cache that grows in place, where transformers' default one copies all of itself for every token."""

from __future__ import annotations

import functools

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lean_attention.integrations.transformers.cache_layers import (
    GrowsInPlace,
    LeanLayer,
    LeanSlidingWindowLayer,
)
from lean_attention.integrations.transformers.quantised_layers import (
    Quantised,
    QuantisedLayer,
    QuantisedSlidingWindowLayer,
)

# By name: what a cache stores; None is the model's own dtype.
KV_CACHES: dict[str, torch.dtype | None] = {
    "auto": None,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class LeanCache(DynamicCache):
    """transformers' `DynamicCache` with layers that write new tokens behind the old ones.

    Keys and values lie heads first (HND), ``[batch, num_kv_heads, tokens, head_dim]``, at the beginning of
    tensors that have room for an eighth more tokens, or 256. Layers of full and of sliding-window attention
    are of this kind; others (linear, indexed, ...) stay transformers' own. Everything that a `DynamicCache`
    does works: crop, beams, repeat, select, reset, assisted generation, deepcopy, pickle. Sequences of one
    prompt, which `accelerate` makes, have its tokens in common (prompt_pages.py).

    Steps and beams write into memory that the cache shares with tensors it gave out before. Copy a cache with
    `copy.deepcopy` (as for prefix reuse), not with `copy.copy`.

    Args:
        config: the model's config, of which the text decoder's is used.
        kv_cache: what it stores. "auto": the model's dtype. "int8", "float8_e4m3fn": a byte per number, and
            a float32 scale for each token and head. Queries attend to the tokens of their own step as they
            are, to older ones as they are stored.

    Raises:
        ValueError: kv_cache is none of these.
    """

    def __init__(self, config: PreTrainedConfig, kv_cache: str = "auto") -> None:
        check_kv_cache("LeanCache", kv_cache)
        super().__init__(config=config)
        self._grow_in_place(kv_cache)

    @classmethod
    def of(cls, cache: DynamicCache, kv_cache: str = "auto") -> LeanCache:
        """A cache in the place of a `DynamicCache` that holds no tokens yet."""
        lean = cls.__new__(cls)
        lean.__dict__.update(cache.__dict__)
        lean._grow_in_place(kv_cache)
        return lean

    # Rows of a first step that are one prompt's: see samples.py.
    sequences_per_prompt = 1

    def repeat_prompts(self) -> None:
        """Makes `sequences_per_prompt` rows of each, which keep its tokens once where they can."""
        repeats, self.sequences_per_prompt = self.sequences_per_prompt, 1
        for layer in self.layers:
            if type(layer) is LeanLayer:
                layer.repeat_prompts(repeats)
            else:
                layer.batch_repeat_interleave(repeats)

    @property
    def grows_in_place(self) -> bool:
        """All layers are of this package."""
        return all(isinstance(layer, GrowsInPlace) for layer in self.layers)

    def _grow_in_place(self, kv_cache: str) -> None:
        self.kv_cache = kv_cache
        self.layers = [_grows_in_place(layer, kv_cache) for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:  # a layer is made for each new index
            self.layer_class_to_replicate = functools.partial(_new_layer, kv_cache)

    def __iter__(self):
        for layer in self.layers:
            kept = layer.dequantised() if isinstance(layer, Quantised) else (layer.keys, layer.values)
            yield *kept, getattr(layer, "_sliding_window_tensor", None)


def check_kv_cache(caller: str, kv_cache: str) -> None:
    """Raises ValueError for a name that is none of `KV_CACHES`."""
    if kv_cache not in KV_CACHES:
        choices = ", ".join(map(repr, KV_CACHES))
        raise ValueError(f"{caller}: kv_cache is {kv_cache!r}; it must be one of {choices}")


def _grows_in_place(layer, kv_cache: str):
    """A layer of ours in the place of one of transformers', where there is one."""
    dtype = KV_CACHES[kv_cache]
    kinds = {
        DynamicLayer: LeanLayer if dtype is None else QuantisedLayer,
        DynamicSlidingWindowLayer: LeanSlidingWindowLayer if dtype is None else QuantisedSlidingWindowLayer,
    }
    kind = kinds.get(type(layer))
    if kind is None:
        return layer
    lean = kind.__new__(kind)
    lean.__dict__.update(layer.__dict__)
    if dtype is not None:
        lean.stored_dtype = dtype
    return lean


def _new_layer(kv_cache: str):
    return _grows_in_place(DynamicLayer(), kv_cache)
