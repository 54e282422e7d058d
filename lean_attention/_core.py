"""The compiled core: importing this module loads it, and with it registers the ops."""

from __future__ import annotations

import importlib
import importlib.util

import torch  # noqa: F401  (first: the core links against its libraries)

from lean_attention._build import build_in_place

_NAME = "lean_attention._C"

# A core that is there but does not load is an error of its own, not a reason to build.
core = build_in_place() if importlib.util.find_spec(_NAME) is None else importlib.import_module(_NAME)
