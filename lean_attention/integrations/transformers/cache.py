"""A cache that grows in place, where transformers' default one copies all of itself for every token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Tokens that a layer has room for beyond those it holds: an eighth more, at the least this many.
RESERVE_TOKENS = 256
RESERVE_SHARE = 8


class LeanCache(DynamicCache):
    """transformers' `DynamicCache` with layers that write new tokens behind the old ones.

    Keys and values lie heads first, ``[batch, num_kv_heads, tokens, head_dim]``, at the beginning of tensors
    that have room for an eighth more tokens, or 256. Layers of full and of sliding-window attention are of
    this kind; others (linear, indexed, ...) stay transformers' own. Everything that a `DynamicCache` does
    works: crop, beams, repeat, select, reset, assisted generation, deepcopy, pickle.

    A step writes into memory that the cache shares with tensors it gave out before. Copy a cache with
    `copy.deepcopy` (as for prefix reuse), not with `copy.copy`.

    Args:
        config: the model's config, of which the text decoder's is used.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self._grow_in_place()

    @classmethod
    def of(cls, cache: DynamicCache) -> LeanCache:
        """A cache with the layers (and tokens) of a `DynamicCache`, which should no longer be used."""
        lean = cls.__new__(cls)
        lean.__dict__.update(cache.__dict__)
        lean._grow_in_place()
        return lean

    def _grow_in_place(self) -> None:
        self.layers = [_grows_in_place(layer) for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = LeanLayer


def _grows_in_place(layer):
    kind = {DynamicLayer: LeanLayer, DynamicSlidingWindowLayer: LeanSlidingWindowLayer}.get(type(layer))
    if kind is None:
        return layer
    lean = kind.__new__(kind)
    lean.__dict__.update(layer.__dict__)
    return lean


class _GrowsInPlace:
    """Appends to `keys` and `values`, which are views of longer tensors while nobody has replaced them."""

    _reserves: dict[str, Tensor] | None = None

    def _append(self, name: str, new: Tensor) -> Tensor:
        """Writes tokens behind those of ``self.<name>``; returns both."""
        held = getattr(self, name)
        if held is None or held.dim() != new.dim():  # not initialised but for its dtype
            held = new[:, :, :0]
        count, added = held.shape[2], new.shape[2]
        reserves = self._reserves or {}
        reserve = reserves.get(name)
        start = _start_of(held, reserve, new)
        if start is None or start + count + added > reserve.shape[2]:
            start, tokens = 0, count + added
            room = tokens + max(RESERVE_TOKENS, tokens // RESERVE_SHARE)
            reserve = new.new_empty(*new.shape[:2], room, *new.shape[3:])
            reserve[:, :, :count] = held
            self._reserves = {**reserves, name: reserve}
        reserve[:, :, start + count : start + count + added] = new
        return reserve[:, :, start : start + count + added]

    def _keep(self, name: str, tokens: Tensor) -> None:
        """Sets ``self.<name>`` to some of the tokens in its reserve, in a smaller one where they are few."""
        count = tokens.shape[2]
        if self._reserves[name].shape[2] > 2 * count + 2 * RESERVE_TOKENS:
            setattr(self, name, None)
            del self._reserves[name]
            tokens = self._append(name, tokens)
        setattr(self, name, tokens)

    def _drop_reserves(self) -> None:
        self._reserves = None


def _start_of(held: Tensor, reserve: Tensor | None, new: Tensor) -> int | None:
    """Where tokens lie in a reserve that more can be written to; None where they lie elsewhere."""
    if reserve is None or (reserve.is_inference() and not torch.is_inference_mode_enabled()):
        return None
    if (reserve.dtype, reserve.device) != (new.dtype, new.device) or held.device != new.device:
        return None
    if held.untyped_storage().data_ptr() != reserve.untyped_storage().data_ptr():
        return None
    alike = held.stride() == reserve.stride() and held.shape[3:] == reserve.shape[3:] == new.shape[3:]
    if not alike or not held.shape[:2] == reserve.shape[:2] == new.shape[:2]:
        return None
    return (held.storage_offset() - reserve.storage_offset()) // reserve.stride(2)


def _in_place(layer: DynamicLayer, key_states: Tensor, value_states: Tensor) -> bool:
    """Whether nothing forbids to write in place: a graph that remembers or replays what was there."""
    if torch.compiler.is_compiling():
        return False
    tensors = (key_states, value_states, layer.keys, layer.values)
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


class LeanLayer(_GrowsInPlace, DynamicLayer):
    """A layer of full attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes new keys and values, ``[batch, num_kv_heads, tokens, head_dim]``; returns all of them."""
        if not _in_place(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def reset(self) -> None:
        self._drop_reserves()
        super().reset()


class LeanSlidingWindowLayer(_GrowsInPlace, DynamicSlidingWindowLayer):
    """A layer of sliding-window attention: it holds one token less than the window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes new keys and values; returns those that some of the new tokens see."""
        if not _in_place(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        seen = self.sliding_window - 1 + key_states.shape[2]
        results = []
        for name, new in (("keys", key_states), ("values", value_states)):
            tokens = self._append(name, new)
            results.append(tokens[:, :, max(tokens.shape[2] - seen, 0) :])
            if not getattr(self, "record_past", False):
                tokens = tokens[:, :, max(tokens.shape[2] - self.sliding_window + 1, 0) :]
            self._keep(name, tokens)
        return results[0], results[1]

    def reset(self) -> None:
        self._drop_reserves()
        super().reset()
