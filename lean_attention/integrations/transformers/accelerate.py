"""One line for one model: its attention and its cache."""

from __future__ import annotations

import inspect

from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

from lean_attention.integrations.transformers.attention import NAME, register
from lean_attention.integrations.transformers.cache import LeanCache, check_kv_cache
from lean_attention.integrations.transformers.samples import once_per_prompt, repeated

# The parameter of models that takes the cache; transformers 5.24 has given it a new name.
CACHE_PARAMETER = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)

_logger = logging.get_logger("lean_attention.transformers")


def accelerate(model: PreTrainedModel, kv_cache: str | None = "auto") -> PreTrainedModel:
    """Runs this model's attention through this package, with a cache that grows in place.

        model = accelerate(AutoModelForCausalLM.from_pretrained(name))
        model.generate(...)

    ``generate`` and plain forward calls that are given no cache use a :class:`LeanCache`; a cache of your own
    or a ``cache_implementation`` other than "dynamic" is left as it is. Other models are not touched. The
    model can be copied, pickled and saved as before.

    Args:
        model: any transformers model with attention layers; changed in place.
        kv_cache: what the cache stores, as in :class:`LeanCache`: "auto", "int8" or "float8_e4m3fn". Another
            call replaces it; ``None`` undoes all.

    Returns:
        The model.

    Raises:
        ValueError: the model has no attention layers, or kv_cache is none of these.
    """
    if kv_cache is not None:
        check_kv_cache("accelerate", kv_cache)
    before = model.__dict__.get("_prepare_cache_for_generation")
    if kv_cache is None:
        if isinstance(before, _PrepareCache):
            before.undo()
        return model
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    attends = any(isinstance(layer, CacheLayerMixin) for layer in LeanCache(config).layers)
    if not attends or not model._supports_default_dynamic_cache():
        raise ValueError(f"accelerate: {name} has no attention layers with a cache of keys and values")
    register()
    if isinstance(before, _PrepareCache):
        before.undo()
    prepare = _PrepareCache(model, kv_cache, model.config._attn_implementation)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    else:
        _logger.warning_once(
            f"lean_attention: {name} has an attention of its own, which takes no implementation by name: "
            "accelerate changes its cache alone"
        )
    model._prepare_cache_for_generation = prepare
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if (
        CACHE_PARAMETER in inspect.signature(decoder.forward).parameters
        and not model.config.is_encoder_decoder
    ):
        decoder.register_forward_pre_hook(_GiveCache(kv_cache), with_kwargs=True)
        decoder.register_forward_hook(_RepeatPrompts(), with_kwargs=True)
    return model


class _PrepareCache:
    """In the place of a model's `_prepare_cache_for_generation`: the dynamic caches it makes become ours."""

    def __init__(self, model: PreTrainedModel, kv_cache: str, attention: str) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._attention = attention

    def __call__(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        given = model_kwargs.get(CACHE_PARAMETER)
        type(self._model)._prepare_cache_for_generation(
            self._model, generation_config, model_kwargs, *args, **kwargs
        )
        made = model_kwargs.get(CACHE_PARAMETER)
        if made is None or made is given:
            return
        cache = model_kwargs[CACHE_PARAMETER] = _lean(made, self._kv_cache)
        if type(cache) is LeanCache and cache.grows_in_place:
            repeats = generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            cache.sequences_per_prompt = max(repeats)

    def undo(self) -> None:
        model = self._model
        del model._prepare_cache_for_generation
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _GiveCache):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, _RepeatPrompts):
                    del module._forward_hooks[key]
                    module._forward_hooks_with_kwargs.pop(key, None)
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(self._attention)


class _GiveCache:
    """A decoder's forward pre-hook: a call that would make itself a dynamic cache is given ours, and one that
    would read the same prompt several times reads it once.
    """

    def __init__(self, kv_cache: str) -> None:
        self._kv_cache = kv_cache

    def __call__(self, decoder, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        cache = kwargs.get(CACHE_PARAMETER)
        if isinstance(cache, LeanCache) and cache.sequences_per_prompt > 1:
            once = None if args or decoder.training else once_per_prompt(cache, kwargs)
            if once is None:
                cache.sequences_per_prompt = 1
                return None
            return args, once
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", False)
        if not use_cache or kwargs.get(CACHE_PARAMETER) is not None or decoder.training:
            return None
        return args, {**kwargs, CACHE_PARAMETER: LeanCache(decoder.config, self._kv_cache)}


class _RepeatPrompts:
    """A decoder's forward hook: after prompts were read once, there are as many rows as were asked for."""

    def __call__(self, decoder, args: tuple, kwargs: dict, output: object) -> object | None:
        cache = kwargs.get(CACHE_PARAMETER)
        if not isinstance(cache, LeanCache) or cache.sequences_per_prompt == 1:
            return None
        repeats = cache.sequences_per_prompt
        rows = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        cache.repeat_prompts()
        return repeated(output, len(rows), repeats)


def _lean(cache, kv_cache: str):
    if isinstance(cache, EncoderDecoderCache):
        cache.self_attention_cache = _lean(cache.self_attention_cache, kv_cache)
        return cache
    # A subclass, or a cache that is moved between devices, is more than this package knows.
    return LeanCache.of(cache, kv_cache) if type(cache) is DynamicCache and not cache.offloading else cache
