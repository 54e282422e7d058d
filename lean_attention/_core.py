"""The compiled core: importing this module loads it, and with it registers the ops."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch  # noqa: F401  (first: the core links against its libraries)

from lean_attention._build import build_in_place

_NAME = "lean_attention._C"


def _is_wanted_anew() -> bool:
    """LEAN_ATTENTION_JIT=1 builds from the sources, whatever binary lies beside them."""
    asked = os.environ.get("LEAN_ATTENTION_JIT", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"LEAN_ATTENTION_JIT is {asked!r}; it must be 0 or 1")
    return asked == "1"


# A core that is there but does not load is an error of its own, not a reason to build.
_builds = _is_wanted_anew() or importlib.util.find_spec(_NAME) is None
core = build_in_place() if _builds else importlib.import_module(_NAME)
