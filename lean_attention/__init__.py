"""LeanAttention: exact stream-K attention for the decode phase of language models."""

from lean_attention import reference
from lean_attention._version import __version__
from lean_attention.huge_pages import use_huge_pages
from lean_attention.integrations.flash_attention import flash_attn_with_kvcache
from lean_attention.ops import append_kv, check_errors, decode, merge_states
from lean_attention.schedule import Schedule, Segment

__all__ = [
    "Schedule",
    "Segment",
    "__version__",
    "append_kv",
    "check_errors",
    "decode",
    "flash_attn_with_kvcache",
    "merge_states",
    "reference",
    "use_huge_pages",
]
