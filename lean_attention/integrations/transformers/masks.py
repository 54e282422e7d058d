"""Masks of transformers: what they say in the terms of the op, and in the forms that others take."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

# Numbers of a mask that are compared at a time.
MASK_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Visible:
    """What a mask means in the terms of :func:`lean_attention.decode`."""

    seq_lens: Tensor  # [batch] int32
    leftpad: Tensor  # [batch] int32
    window_left: int
    causal: bool


@dataclass
class _Remembered:
    """What was found out of a mask when a layer of a forward pass asked."""

    config: object
    layer: int
    key: object
    found: object


def _in_pass(module: torch.nn.Module, mask: Tensor, key: object, find: Callable[[], object]) -> object:
    """What `find` gives for a mask, looked for once for all layers of a forward pass.

    A mask may be a buffer that the caller fills anew for every pass, and under inference mode a tensor does
    not count its changes. So what is remembered lasts from one layer to a later one of the same model.

    Args:
        module: the attention layer that asks.
        key: what else the result depends on.
    """
    layer, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    known = getattr(mask, "_lean_attention_pass", None)
    if (
        known is not None
        and layer is not None
        and layer > known.layer
        and config is known.config
        and key == known.key
    ):
        known.layer = layer
        return known.found
    found = find()
    if layer is not None:
        mask._lean_attention_pass = _Remembered(config, layer, key, found)
    return found


def visible_in_pass(
    module: torch.nn.Module,
    mask: Tensor,
    shape: tuple[int, int, int],
    sliding_window: int | None,
    causal: bool,
) -> Visible | None:
    """`visible_tokens` of a mask, looked at once for all layers of a forward pass.

    Args:
        module: the attention layer that asks.
        mask: bool, ``[batch or 1, 1, q_len or 1, tokens or more]``.
        shape: ``(batch, q_len, tokens)`` of the step.
        sliding_window, causal: as in `visible_tokens`.
    """
    if torch.compiler.is_compiling():
        return visible_tokens(_fitted(mask, shape), sliding_window, causal)
    return _in_pass(module, mask, shape, lambda: visible_tokens(_fitted(mask, shape)))


def own_mask(*args, config: PreTrainedConfig | None = None, **options) -> Tensor | None:
    """The mask function of this package's attention: bool as sdpa's, or floats as eager attention's.

    A family that does not support sdpa may do with its masks what only floats allow. (transformers checks
    that for "sdpa", and not for a name that was registered.)
    """
    make = sdpa_mask if config is None or supports_sdpa(type(config)) else eager_mask
    return make(*args, config=config, **options)


@torch.compiler.assume_constant_result
def supports_sdpa(config_class: type) -> bool:
    """Whether some model of a family takes masks of sdpa's kind."""
    if config_class not in _SUPPORTS_SDPA:
        module = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
        models = (
            [
                each
                for each in vars(module).values()
                if isinstance(each, type)
                and issubclass(each, PreTrainedModel)
                and each.__module__ == module.__name__
            ]
            if module
            else []
        )
        _SUPPORTS_SDPA[config_class] = not models or any(model._supports_sdpa for model in models)
    return _SUPPORTS_SDPA[config_class]


_SUPPORTS_SDPA: dict[type, bool] = {}


def as_bool(module: torch.nn.Module, mask: Tensor) -> Tensor:
    """A mask of floats that says seen or not (0, or the least number) as one of bools; others as they are."""
    if torch.compiler.is_compiling():
        # Nothing may depend on its contents; but this package made those of these families.
        return mask if supports_sdpa(type(module.config)) else mask == 0

    def find() -> Tensor:
        seen = mask == 0
        unseen = mask <= torch.finfo(mask.dtype).min
        return seen if bool((seen | unseen).all()) else mask

    return _in_pass(module, mask, "as_bool", find)


def _fitted(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A mask as attention applies it: broadcast, and without what lies beyond the keys."""
    batch, q_len, tokens = shape
    return mask[..., :tokens].expand(batch, -1, q_len, tokens)


def visible_tokens(mask: Tensor, sliding_window: int | None = None, causal: bool = True) -> Visible | None:
    """Lengths, padding and window that say exactly what a mask says, or None where none do.

    While compiling nothing may depend on the mask's contents: there the form is taken from `sliding_window`
    and `causal`, and a mask that says something else stops the program when it runs.

    Args:
        mask: bool, ``[batch, 1, q_len, tokens]``.
        sliding_window: tokens that the layer sees at most. Used only while compiling.
        causal: rows see no later position than their own. Used only while compiling.
    """
    compiling = torch.compiler.is_compiling()
    rows = mask[:, 0]
    q_len, tokens = rows.shape[1:]
    token = torch.arange(tokens, device=mask.device)
    last = rows[:, -1]
    seq_lens = torch.where(last, token + 1, 0).amax(dim=1)
    begin_of_last = torch.where(last, token, tokens).amin(dim=1)
    leftpad = torch.where(rows.any(dim=1), token, tokens).amin(dim=1)

    def same(window_left: int, causal: bool) -> Tensor:
        """Whether a form says what the mask says; some rows at a time, as long prompts have large masks."""
        parts = []
        step = q_len if compiling else max(1, MASK_NUMBERS_AT_ONCE // (rows.shape[0] * tokens))
        for first in range(0, q_len, step):
            part = rows[:, first : first + step]
            row = torch.arange(first, first + part.shape[1], device=mask.device)
            position = (seq_lens[:, None] - q_len + row)[..., None]
            said = token >= leftpad[:, None, None]
            said = said & (token <= position if causal else token < seq_lens[:, None, None])
            if window_left >= 0:
                said &= token >= position - window_left
            parts.append((said == part).all())
            if not compiling and not bool(parts[-1]):
                break
        return torch.stack(parts).all()

    def visible(window_left: int, causal: bool) -> Visible:
        return Visible(seq_lens.int(), leftpad.clamp(max=tokens).int(), window_left, causal)

    if compiling:
        window_left = sliding_window - 1 if sliding_window is not None and q_len > 1 else -1
        torch._assert_async(
            same(window_left, True),
            "lean_attention: in a compiled step an attention mask that is not lengths, left padding and a "
            "window; use attn_implementation='sdpa', or do not compile this step",
        )
        return visible(window_left, causal)
    window_left = -1
    if q_len > 1:  # where the last row begins later than others there is a window
        moves = begin_of_last > leftpad
        if bool(moves.any()):
            window_left = int((seq_lens - 1 - begin_of_last)[moves].max())
    if bool(same(window_left, True)):
        return visible(window_left, True)
    if q_len > 1 and bool(same(-1, False)):
        return visible(-1, False)
    return None


def float_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """A mask as eager attention adds it to the scores: 0 where a token is seen, the least number elsewhere.

    Args:
        mask: bool, any that broadcasts; or None, which transformers means as in `plain_causal`.
        causal: the layer is one of a decoder.
    """
    if mask is None:
        if query.shape[2] == 1 or not causal:
            return None
        mask = plain_causal(query.shape[2], key.shape[2], query.device)
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def plain_causal(q_len: int, tokens: int, device: torch.device) -> Tensor:
    """What transformers means where it leaves out a decoder's mask: nothing is cached before the query."""
    token = torch.arange(tokens, device=device)
    return (token <= torch.arange(q_len, device=device)[:, None])[None, None]


def block_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> BlockMask | None:
    """A mask as flex attention takes it; arguments as of `float_mask`."""
    batch, q_len, tokens = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        return _causal_block_mask(q_len, tokens, str(query.device)) if causal and q_len > 1 else None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    seen = _fitted(mask, (batch, q_len, tokens))
    heads, of_all_heads = seen.shape[1], seen[:, 0]
    if heads == 1:
        return create_block_mask(
            lambda b, h, q, k: of_all_heads[b, q, k], batch, None, q_len, tokens, device=query.device
        )
    return create_block_mask(
        lambda b, h, q, k: seen[b, h, q, k], batch, heads, q_len, tokens, device=query.device
    )


@functools.lru_cache(maxsize=4)
def _causal_block_mask(q_len: int, tokens: int, device: str) -> BlockMask:
    return create_block_mask(lambda b, h, q, k: k <= q, None, None, q_len, tokens, device=device)
