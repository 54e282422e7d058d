"""transformers' attention interface: which steps the op takes, and who gets the others."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

import lean_attention
from lean_attention.integrations.transformers import continuous_batching
from lean_attention.integrations.transformers.masks import (
    as_bool,
    block_mask,
    float_mask,
    own_mask,
    visible_in_pass,
)
from lean_attention.integrations.transformers.options import special_options, why_not
from lean_attention.integrations.transformers.prefill import op_is_faster
from lean_attention.integrations.transformers.prompt_pages import equal_lengths, pages_of
from lean_attention.integrations.transformers.quantised_layers import QuantisedStates, decode_quantised
from lean_attention.integrations.transformers.samples import shared_rows
from lean_attention.integrations.transformers.sparse import SELECTIONS, with_selection

NAME = "lean_attention"
AUTO = "auto"

# Query tokens from which on a step counts as prefill: there it is products that take the time, not the cache.
MAX_QUERY_TOKENS = 32

_logger = logging.get_logger("lean_attention.transformers")


@dataclass(frozen=True)
class _Implementation:
    """An attention implementation of transformers that steps are left to."""

    name: str
    mask_of: Callable  # from a bool mask, as `masks.float_mask`
    takes: frozenset[str]  # options that it names in its signature


def register(prefill: str | None = None) -> None:
    """Makes ``attn_implementation="lean_attention"`` known to transformers; calling it again is harmless.

    The attention of continuous batching, ``"paged|eager"``, becomes this package's too: it reads the pages
    where they lie, which transformers' own gathers first.

    Args:
        prefill: who takes steps of many query tokens. ``"auto"``: on a CPU this package or ``"sdpa"``,
            whichever a short measurement finds faster; on a GPU ``"sdpa"``. Or an implementation:
            ``"sdpa"``, ``"eager"``, ``"flex_attention"``, or one of your own that transformers gives the
            masks of these. ``None`` keeps what an earlier call chose, at first ``"auto"``. Soft-capped
            scores and attention sinks, which transformers' "sdpa" does not have, stay with this package for
            steps of any length.

    Raises:
        ValueError: transformers knows no implementation of that name, or its masks are of another kind.
    """
    global _prefill, _prefill_is_measured
    if prefill is not None:
        chosen = _implementation("sdpa" if prefill == AUTO else prefill)
        if chosen is None:
            known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
            names = [AUTO, *sorted(name for name in known if _implementation(name))]
            raise ValueError(f"register: prefill is {prefill!r}; it must be one of {', '.join(names)}")
        _prefill, _prefill_is_measured = chosen, prefill == AUTO
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, own_mask)
    continuous_batching.register()


def _implementation(name: str) -> _Implementation | None:
    """The implementation of a name; None for an unknown one, or one with masks of another kind."""
    if name == "eager":  # every family has its own, which knows the family's options
        return _Implementation(name, float_mask, frozenset())
    mask_of = _MASK_CONVERSIONS.get(ALL_MASK_ATTENTION_FUNCTIONS.get(name))
    if name == NAME or name not in ALL_ATTENTION_FUNCTIONS or mask_of is None:
        return None
    takes = frozenset(inspect.signature(ALL_ATTENTION_FUNCTIONS[name]).parameters)
    # Flex attention names sinks, and refuses them on a CPU.
    return _Implementation(name, mask_of, takes - {"s_aux"})


# By the function that makes an implementation's masks. Flash attention's are lengths, not masks.
_MASK_CONVERSIONS: dict[Callable | None, Callable] = {
    sdpa_mask: lambda mask, *_: mask,
    eager_mask: float_mask,
    flex_attention_mask: block_mask,
}
_EAGER = _implementation("eager")
_prefill = _implementation("sdpa")
_prefill_is_measured = True


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query, key and value are ``[batch, heads, tokens, dim]``."""
    batch, q_len, tokens = query.shape[0], query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else bool(causal)
    special = special_options(options)
    if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
        attention_mask = as_bool(module, attention_mask)
    if special & SELECTIONS:
        attention_mask, special = with_selection(module, query, key, attention_mask, options, special, causal)
    # Without a mask every token is seen; by more than one query token, in their order, as a prefill means it.
    plain_prefill = attention_mask is None and q_len > 1
    # While compiling nothing tells a prefill's mask; only a cache before the query tokens shows it is none.
    hidden_mask = torch.compiler.is_compiling() and q_len > 1 and (tokens == q_len or not causal)
    few = q_len <= MAX_QUERY_TOKENS and not plain_prefill and not hidden_mask
    reason = why_not(query, key, value, dropout, special, options.get("s_aux"))
    reason = reason or _why_not_mask(attention_mask, query, key)
    if reason is None and hidden_mask and special:
        reason = "a compiled prefill, of which the mask is not known"
    mine = few or bool(special)  # not left to the prefill implementation, unless there is a reason
    takes = reason is None and (mine or (_prefill_is_measured and op_is_faster(query, key, value)))
    visible = None
    if takes and attention_mask is not None:
        window = options.get("sliding_window")
        visible = visible_in_pass(module, attention_mask, (batch, q_len, tokens), window, causal)
        if visible is None:
            takes, reason = False, "an attention mask that is not lengths, left padding and one window"
    if not takes:
        return _leave(
            reason if mine else None,
            module,
            query,
            key,
            value,
            attention_mask,
            causal,
            special,
            {"scaling": scaling, "dropout": dropout, **options},
        )
    sinks = options.get("s_aux")
    scores = {
        "scale": scaling,
        "softcap": options.get("softcap") or 0.0,
        "sinks": None if sinks is None else sinks.float(),
    }
    if isinstance(key, QuantisedStates) and isinstance(value, QuantisedStates) and key.stored.shape[2]:
        out = decode_quantised(query, key, value, visible, **scores)
        if out is not None:
            return out, None
    key, value = (x.dequantised() if isinstance(x, QuantisedStates) else x for x in (key, value))
    if plain_prefill and causal:
        key, value = key[:, :, :q_len], value[:, :, :q_len]  # an empty static cache is longer
    seq_lens = None if visible is None else visible.seq_lens
    pages = pages_of(key, value)
    if pages is not None and seq_lens is None:
        seq_lens = equal_lengths(batch, tokens)
    leftpad = None if visible is None else visible.leftpad
    window_left = -1 if visible is None else visible.window_left
    shared = shared_rows(key, most=tokens - q_len) if few and window_left < 0 else None
    if shared is not None and visible is not None:
        if bool(leftpad.any()) or bool((visible.seq_lens != tokens).any()):
            shared = None
        else:
            leftpad = None
    out, _ = lean_attention.decode(
        query.transpose(1, 2),
        (key if pages is None else pages.keys).transpose(1, 2),
        (value if pages is None else pages.values).transpose(1, 2),
        seq_lens,
        None if pages is None else pages.table,
        cache_leftpad=leftpad,
        window_left=window_left,
        causal=plain_prefill and causal if visible is None else visible.causal,
        shared=shared,
        **scores,
    )
    return out, None


def _why_not_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> str | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return f"an attention mask of type {type(mask).__name__}"
    if mask.dtype != torch.bool:
        return f"an attention mask of {mask.dtype}"
    if mask.dim() != 4 or mask.shape[1] != 1:
        return "an attention mask that differs between heads"
    if mask.shape[0] not in (1, query.shape[0]) or mask.shape[2] not in (1, query.shape[2]):
        return "an attention mask that does not fit the query"
    if mask.shape[3] < key.shape[2]:
        return "an attention mask that is shorter than the keys"
    return None


def _leave(
    reason: str | None,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    special: set[str],
    options: dict,
) -> tuple[Tensor, Tensor | None]:
    """Gives a step to the prefill implementation, or, where that would drop an option, to eager attention."""
    to = _prefill if special <= _prefill.takes else _EAGER
    run = _eager_of(type(module)) if to == _EAGER else ALL_ATTENTION_FUNCTIONS[to.name]
    family = type(module).__name__
    if run is None:
        raise ValueError(
            f"lean_attention: {family} has no eager attention of its own to leave a step to, and this "
            f"package cannot run it: {reason}"
        )
    if reason is not None and not torch.compiler.is_compiling():
        _logger.warning_once(
            f"lean_attention: some steps of {family} are left to {to.name!r} attention: {reason}"
        )
    return run(module, query, key, value, to.mask_of(mask, query, key, causal), **options)


def _eager_of(family: type) -> Callable | None:
    """The eager attention of a module's family, which stands in the family's own file."""
    for cls in family.__mro__:
        own = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if own is not None:
            return own
    return None
