"""Layers of a cache that store a byte per number, and a scale for each token and head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import lean_attention
from lean_attention.integrations.transformers.cache_layers import GrowsInPlace
from lean_attention.integrations.transformers.masks import Visible


class QuantisedStates(torch.Tensor):
    """Keys or values, ``[batch, num_kv_heads, tokens, dim]``: older tokens as stored, new ones as they are.

    This package's attention reads the parts. To everything else it is the tensor that they make: any
    operation on it dequantises.
    """

    stored: Tensor  # [batch, num_kv_heads, older tokens, dim]
    scales: Tensor  # [batch, num_kv_heads, older tokens]
    new: Tensor  # [batch, num_kv_heads, new tokens, dim]

    @staticmethod
    def __new__(cls, stored: Tensor, scales: Tensor, new: Tensor) -> QuantisedStates:
        shape = (*new.shape[:2], stored.shape[2] + new.shape[2], new.shape[3])
        states = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=new.dtype, device=new.device, requires_grad=new.requires_grad
        )
        states.stored, states.scales, states.new = stored, scales, new
        return states

    def __repr__(self) -> str:
        return f"QuantisedStates({self.stored.dtype}, shape={list(self.shape)})"

    def dequantised(self) -> Tensor:
        if self.stored.shape[2] == 0:
            return self.new.contiguous()  # as this tensor says of itself
        return torch.cat([dequantise(self.stored, self.scales, self.new.dtype), self.new], dim=2)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(x):
            return x.dequantised() if isinstance(x, QuantisedStates) else x

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def decode_quantised(
    query: Tensor,
    key: QuantisedStates,
    value: QuantisedStates,
    visible: Visible | None,
    sinks: Tensor | None,
    **options,
) -> Tensor | None:
    """Attention over the older tokens as they are stored and the new ones as they are, merged.

    Args:
        query: ``[batch, num_heads, q_len, head_dim]``.
        visible: what the mask says; None: everything is seen.
        options: of `lean_attention.decode`: scale, softcap.

    Returns:
        ``[batch, q_len, num_heads, head_dim_v]``, or None where the two parts cannot say what the mask says.
    """
    older, new, q_len = key.stored.shape[2], key.new.shape[2], query.shape[2]
    window = -1 if visible is None else visible.window_left
    if visible is not None and bool((visible.seq_lens != older + new).any()):
        return None
    # To the older tokens alone a query token is `q_len` positions behind where it is to all of them.
    if q_len > older or (visible is None and q_len > 1) or q_len != new or 0 <= window < q_len:
        return None
    leftpad = None if visible is None else visible.leftpad
    q = query.transpose(1, 2)
    states = [
        lean_attention.decode(
            q,
            key.stored.transpose(1, 2),
            value.stored.transpose(1, 2),
            cache_leftpad=None if leftpad is None else leftpad.clamp(max=older),
            k_scale=key.scales.transpose(1, 2),
            v_scale=value.scales.transpose(1, 2),
            causal=False,
            window_left=window - q_len if window >= 0 else -1,
            sinks=sinks,
            out_dtype=torch.float32,
            **options,
        ),
        lean_attention.decode(
            q,
            key.new.transpose(1, 2),
            value.new.transpose(1, 2),
            cache_leftpad=None if leftpad is None else (leftpad - older).clamp(min=0),
            causal=visible is not None and visible.causal,
            out_dtype=torch.float32,
            **options,
        ),
    ]
    outs, lses = [out for out, _ in states], [lse for _, lse in states]
    return lean_attention.merge_states(outs, lses, out_dtype=query.dtype)[0]


def dequantise(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows times their scales, rounded to a dtype."""
    return (stored.float() * scales[..., None]).to(dtype)


class Quantised(GrowsInPlace):
    """What quantised layers share: ``keys`` and ``values`` are int8, with the bits of `stored_dtype`."""

    stored_dtype: torch.dtype
    key_scales: Tensor | None = None  # [batch, num_kv_heads, tokens, 1], float32
    value_scales: Tensor | None = None

    @torch.compiler.disable  # it looks at where tensors lie
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores new keys and values; returns `QuantisedStates` of those that some of the new tokens see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.dtype = key_states.dtype
        added, device = key_states.shape[2], key_states.device
        names = ("keys", "values", "key_scales", "value_scales")
        parts = {}
        for name, new in zip(names, (key_states, value_states) * 2, strict=True):
            scales = name.endswith("scales")
            shape = (*new.shape[:3], 1) if scales else new.shape
            parts[name] = self._with_room(name, shape, torch.float32 if scales else torch.int8, device)
        keys, values, key_scales, value_scales = parts.values()
        before = keys.shape[2] - added
        with torch.no_grad():
            lean_attention.append_kv(
                keys.view(self.stored_dtype).transpose(1, 2),
                values.view(self.stored_dtype).transpose(1, 2),
                key_states.detach().transpose(1, 2),
                value_states.detach().transpose(1, 2),
                torch.full((keys.shape[0],), before, dtype=torch.int32, device=device),
                k_scale=key_scales[..., 0].transpose(1, 2),
                v_scale=value_scales[..., 0].transpose(1, 2),
            )
        first, kept = self._first_seen_and_kept(keys.shape[2], added)
        for name, part in parts.items():
            self._keep(name, part[:, :, kept:])
        old = slice(first, before)
        return (
            QuantisedStates(keys[:, :, old].view(self.stored_dtype), key_scales[:, :, old, 0], key_states),
            QuantisedStates(
                values[:, :, old].view(self.stored_dtype), value_scales[:, :, old, 0], value_states
            ),
        )

    def _first_seen_and_kept(self, tokens: int, added: int) -> tuple[int, int]:
        """Of all tokens, with the new ones: the first that some new one sees, and the first to keep."""
        return 0, 0

    def dequantised(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values as attention sees them once they are stored."""
        if self.key_scales is None:
            return None, None
        return (
            dequantise(self.keys.view(self.stored_dtype), self.key_scales[..., 0], self.dtype),
            dequantise(self.values.view(self.stored_dtype), self.value_scales[..., 0], self.dtype),
        )

    def _change(self, method: Callable[..., None], *args) -> None:
        """Calls a method that changes ``keys`` and ``values`` for these, and once more for their scales."""
        count = getattr(self, "cumulative_length", None)
        method(*args)
        if self.key_scales is None:
            return
        kept = self.keys, self.values
        if count is not None:
            self.cumulative_length = count
        self.keys, self.values = self.key_scales, self.value_scales
        method(*args)
        self.key_scales, self.value_scales = self.keys, self.values
        self.keys, self.values = kept

    def crop(self, tokens_to_remove: int) -> None:
        self._change(super().crop, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(super().reorder_cache, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(super().batch_repeat_interleave, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(super().batch_select_indices, indices)

    def offload(self) -> None:
        self._change(super().offload)

    def prefetch(self) -> None:
        self._change(super().prefetch)

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = self.key_scales = self.value_scales = self._reserves = None
        self.is_initialized = False


class QuantisedLayer(Quantised, DynamicLayer):
    """A quantised layer of full attention."""


class QuantisedSlidingWindowLayer(Quantised, DynamicSlidingWindowLayer):
    """A quantised layer of sliding-window attention."""

    def _first_seen_and_kept(self, tokens: int, added: int) -> tuple[int, int]:
        self.cumulative_length += added
        window = self.sliding_window - 1
        kept = 0 if getattr(self, "record_past", False) else max(tokens - window, 0)
        return max(tokens - window - added, 0), kept
