"""Hugging Face transformers: ``attn_implementation="lean_attention"``.

    from lean_attention.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lean_attention")

Steps of few query tokens (decoding, speculation) go to :func:`lean_attention.decode`, longer ones (prefill)
to another implementation. The masks that transformers makes are turned into lengths, left padding and
windows, and compared with what these mean, element by element. What the op cannot say goes to an
implementation that can, and a warning says so once.

Continuous batching (``model.generate_batch``) runs through this package under the name that transformers
admits there, ``"paged|eager"``.
"""

from __future__ import annotations

try:
    import transformers.generation.continuous_batching.cache_allocators  # noqa: F401
except ImportError as error:  # no transformers, or one from before 5.19
    raise ImportError(
        "lean_attention.integrations.transformers needs transformers 5.19 or newer "
        "(pip install 'transformers>=5.19')"
    ) from error

from lean_attention.integrations.transformers.accelerate import CACHE_PARAMETER, accelerate
from lean_attention.integrations.transformers.attention import MAX_QUERY_TOKENS, NAME, register
from lean_attention.integrations.transformers.cache import LeanCache
from lean_attention.integrations.transformers.continuous_batching import PAGED_NAME
from lean_attention.integrations.transformers.masks import Visible, visible_tokens
from lean_attention.integrations.transformers.options import KNOWN_OPTIONS

__all__ = [
    "CACHE_PARAMETER",
    "KNOWN_OPTIONS",
    "MAX_QUERY_TOKENS",
    "NAME",
    "PAGED_NAME",
    "LeanCache",
    "Visible",
    "accelerate",
    "register",
    "visible_tokens",
]
