"""The CUDA backend's host layer, compiled for the host above a CUDA runtime that records its calls.

This folder comes first on the include path: csrc/cuda finds its cuda_runtime.h, and csrc/ops its dlfcn.h.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import pytest

from lean_attention import _build
from tests import emulation

HERE = Path(__file__).resolve().parent
NAME = "lean_attention_cuda_host"


@functools.cache
def load() -> ModuleType:
    """Builds it into build/ (a quarter of a minute, the first time)."""
    from torch.utils import cpp_extension

    directory = _build.ROOT / "build" / "cuda_host"
    if not emulation.may_build and not emulation.is_built(directory / f"{NAME}.so", HERE):
        pytest.skip("the host layer is not built; make test builds it")
    emulated = [emulation.HERE / name for name in ("device.cpp", "collectives.cpp")]
    sources = [HERE / "bindings.cpp", _build.ROOT / "csrc" / "bad_numbers.cpp", *emulated]
    flags = [flag for flag in _build.COMPILE_FLAGS if flag != "-O3"]
    with _build.locked(directory):
        return cpp_extension.load(
            name=NAME,
            sources=[str(source) for source in sources],
            extra_cflags=[*flags, "-O1", "-Wno-unknown-pragmas"],
            # What it defines of libtorch's is for itself alone.
            extra_ldflags=["-Wl,-Bsymbolic"],
            extra_include_paths=[str(HERE), *_build.INCLUDE_DIRS, str(emulation.HERE)],
            build_directory=str(directory),
        )
