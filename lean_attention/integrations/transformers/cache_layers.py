"""Layers of a cache that grow in place, where transformers' default ones copy themselves for every token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lean_attention.huge_pages import use_huge_pages
from lean_attention.integrations.transformers.prompt_pages import (
    RESERVE_SHARE,
    pages_of,
    repeat_in_pages,
    whole,
)
from lean_attention.integrations.transformers.samples import Prompt, mark

# Tokens that a layer has room for beyond those it holds: an eighth more, at the least this many.
RESERVE_TOKENS = 256


class GrowsInPlace:
    """Appends to `keys` and `values`, which are views of longer tensors while nobody has replaced them."""

    _reserves: dict[str, Tensor] | None = None

    def _append(self, name: str, new: Tensor) -> Tensor:
        """Writes tokens behind those of ``self.<name>``; returns both."""
        tokens = self._with_room(name, new.shape, new.dtype, new.device)
        tokens[:, :, tokens.shape[2] - new.shape[2] :] = new
        return tokens

    def _with_room(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tokens of ``self.<name>``, and behind them memory for those of a tensor of `shape`."""
        held = getattr(self, name)
        count = held.shape[2] if held is not None and held.dim() == len(shape) else 0
        added = shape[2]
        reserves = self._reserves or {}
        reserve = reserves.get(name)
        start = _start_of(held, reserve) if count and _fits(reserve, shape, dtype, device) else None
        if start is None or start + count + added > reserve.shape[2]:
            start, tokens = 0, count + added
            room = tokens + max(RESERVE_TOKENS, tokens // RESERVE_SHARE)
            reserve = torch.empty(*shape[:2], room, *shape[3:], dtype=dtype, device=device)
            # Huge pages take the room of each head too, which is then an eighth at most.
            if tokens >= RESERVE_TOKENS * RESERVE_SHARE:
                use_huge_pages(reserve, written=False)
            if count:
                reserve[:, :, :count] = held
            self._reserves = {**reserves, name: reserve}
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


def _fits(reserve: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tokens of this shape can be written to a reserve."""
    if reserve is None or (reserve.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    alike = reserve.shape[:2] == shape[:2] and reserve.shape[3:] == shape[3:]
    return alike and reserve.dtype == dtype and reserve.device == device


def _start_of(held: Tensor, reserve: Tensor) -> int | None:
    """Where tokens lie in a reserve; None where they lie elsewhere, since somebody has replaced them."""
    if held.device != reserve.device or held.dtype != reserve.dtype or held.stride() != reserve.stride():
        return None
    if held.untyped_storage().data_ptr() != reserve.untyped_storage().data_ptr():
        return None
    if held.shape[:2] != reserve.shape[:2] or held.shape[3:] != reserve.shape[3:]:
        return None
    return (held.storage_offset() - reserve.storage_offset()) // reserve.stride(2)


def _in_place(layer: DynamicLayer, key_states: Tensor, value_states: Tensor) -> bool:
    """Whether nothing forbids to write in place: a graph that remembers or replays what was there."""
    if torch.compiler.is_compiling():
        return False
    tensors = (key_states, value_states, layer.keys, layer.values)
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


class LeanLayer(GrowsInPlace, DynamicLayer):
    """A layer of full attention. `prompt` is what its rows have in common, where they do.

    After `repeat_prompts` its ``keys`` and ``values`` are `PagedStates`. What is not overridden here makes
    ordinary tensors of them.
    """

    prompt: Prompt | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes new keys and values, ``[batch, num_kv_heads, tokens, head_dim]``; returns all of them."""
        in_place = _in_place(self, key_states, value_states)
        pages = pages_of(self.keys, self.values)
        if in_place and pages is not None and pages.takes(key_states, value_states):
            self.keys, self.values = pages.append(key_states, value_states).states()
            return mark(self.keys, self.prompt), self.values
        self.keys, self.values = whole(self.keys), whole(self.values)
        if not in_place:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return mark(self.keys, self.prompt), self.values

    def repeat_prompts(self, repeats: int) -> None:
        """Makes `repeats` rows of each. On a CPU what they have in common is kept once."""
        tokens = self.get_seq_length()
        if tokens and self.keys.device.type == "cpu" and _in_place(self, self.keys, self.values):
            self.keys, self.values = repeat_in_pages(self.keys, self.values, repeats).states()
            self._drop_reserves()
        else:
            self.batch_repeat_interleave(repeats)
        self.prompt = Prompt(repeats, tokens)

    def reset(self) -> None:
        self.prompt = None
        self._drop_reserves()
        super().reset()

    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        if self.prompt is not None:
            tokens = min(self.prompt.tokens, self.get_seq_length())
            self.prompt = Prompt(self.prompt.sequences, tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pages = pages_of(self.keys, self.values)
        if pages is not None and beam_idx.shape == (pages.rows,):
            self.keys, self.values = pages.reorder(beam_idx.to(self.keys.device)).states()
        else:
            super().reorder_cache(beam_idx)
        if self.prompt is not None:
            of_prompt = beam_idx.to("cpu") // self.prompt.sequences
            in_place = torch.arange(len(of_prompt)) // self.prompt.sequences
            if not torch.equal(of_prompt, in_place):  # beams of one prompt in the rows of another
                self.prompt = None

    def batch_select_indices(self, indices: Tensor) -> None:
        self.prompt = None
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.prompt = None
        super().batch_repeat_interleave(repeats)


class LeanSlidingWindowLayer(GrowsInPlace, DynamicSlidingWindowLayer):
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
