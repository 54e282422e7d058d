"""The compiled library: importing this module loads it, which registers the ops, and says what else is in it.

The library has no Python in it: its functions for inspection are ops on numbers and JSON, `tools` here.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from lean_attention._build import build_in_place

NAMESPACE = "lean_attn"
_REINSTALL = "pip install --force-reinstall --no-deps --no-binary lean_attention lean_attention"
_logger = logging.getLogger("lean_attention")
_BINARY = Path(__file__).resolve().with_name("_C.so")


def _is_wanted_anew() -> bool:
    """LEAN_ATTENTION_JIT=1 builds from the sources, whatever binary lies beside them."""
    asked = os.environ.get("LEAN_ATTENTION_JIT", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"LEAN_ATTENTION_JIT is {asked!r}; it must be 0 or 1")
    return asked == "1"


def _load() -> Path:
    """Loads the binary beside this file, or builds one; returns where it is."""
    loaded = [path for path in map(Path, torch.ops.loaded_libraries) if path.name == _BINARY.name]
    # A binary that is there but does not load is an error of its own, not a reason to build.
    binary = build_in_place() if _is_wanted_anew() or not _BINARY.exists() else _BINARY
    if hasattr(getattr(torch.ops, NAMESPACE), "decode") and binary not in loaded:
        others = ", ".join(map(str, loaded)) or "another library"
        raise ImportError(
            f"lean_attention: this process has loaded {others} already, and {binary} has the same ops; "
            "a process can use one copy of the package: uninstall the other one, or take it off sys.path"
        )
    try:
        torch.ops.load_library(binary)
    except OSError as error:
        raise ImportError(_why_not(binary, str(error.__cause__ or error))) from error
    _logger.debug("loaded %s", binary)
    return binary


def _why_not(binary: Path, error: str) -> str:
    """What the loader's error means, in a sentence."""
    here = f"lean_attention: {binary} does not load: "
    if wants := re.search(r"version `((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)' not found", error):
        has = " ".join(platform.libc_ver())
        return f"{here}it needs {wants[1]}, and this system has {has}; build it here: {_REINSTALL}"
    if name := re.search(r"undefined symbol: (\S+)", error):
        return f"{here}torch {torch.__version__} has no {name[1]}; it needs torch 2.10 or newer"
    return f"{here}{error}"


library = _load()
ops = getattr(torch.ops, NAMESPACE)
tools = getattr(torch.ops, f"{NAMESPACE}_tools")


def tuning() -> dict[str, Any]:
    """The row of the CPU's tuning that is in force."""
    return json.loads(tools.tuning())


def tuning_rows(l2_bytes: int, l2_ways: int) -> list[dict[str, Any]]:
    """All rows, generic for a core with this L2."""
    return json.loads(tools.tuning_rows(l2_bytes, l2_ways))


def plan(**arguments: Any) -> dict[str, Any]:
    """The CPU's plan of a decode step; csrc/ops/machine_ops.cpp has the arguments."""
    return json.loads(tools.plan(**arguments))


def cuda_kernels() -> list[list[Any]]:
    """Of every CUDA kernel in this build: dtype, head_dim, head_dim_v, rows, whether for quantised caches,
    threads, shared bytes, bytes in flight."""
    return json.loads(tools.cuda_kernels())
