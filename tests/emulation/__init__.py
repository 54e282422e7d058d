"""The CUDA kernels on an emulated device: their own sources, compiled for the host.

:func:`load` builds them into build/ (about a minute, the first time) and registers
``torch.ops.lean_attn_emulated``, which takes CPU tensors and runs them through the CUDA backend.
LEAN_ATTENTION_EMULATION_SANITIZE=1 builds with AddressSanitizer and UBSan; `make sanitize` does, and preloads
what they need.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType

import pytest

from lean_attention import _build

HERE = Path(__file__).resolve().parent
NAME = "lean_attention_emulated"

# Where False (pytest --quick), a test that needs the emulated device is skipped unless it is built already.
may_build = True


def sanitized() -> bool:
    return os.environ.get("LEAN_ATTENTION_EMULATION_SANITIZE") == "1"


def build_directory() -> Path:
    return _build.ROOT / "build" / ("emulated_sanitized" if sanitized() else "emulated")


def is_built(library: Path, tests: Path) -> bool:
    """And no source has changed since, of csrc or of the tests' own."""
    sources = [Path(_build.__file__), *tests.rglob("*.*"), *(_build.ROOT / "csrc").rglob("*.*")]
    sources = [file for file in sources if file.suffix != ".pyc"]
    return library.exists() and all(file.stat().st_mtime < library.stat().st_mtime for file in sources)


@functools.cache
def load() -> ModuleType:
    from torch.utils import cpp_extension

    if not may_build and not is_built(build_directory() / f"{NAME}.so", HERE):
        pytest.skip("the emulated device is not built; make test builds it")
    flags = [flag for flag in _build.COMPILE_FLAGS if flag != "-O3"]
    flags += ["-O1", "-g1", "-Wno-unknown-pragmas"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitized() else []
    # HERE comes first on the include path: its ops/dispatch.h sends the ops to the emulated device.
    sources = [
        _build.ROOT / source
        for source in _build.sources()
        if not source.startswith("csrc/cpu/")
        and Path(source).name not in ("benchmark_ops.cpp", "machine_ops.cpp", "schedule_ops.cpp")
    ]
    with _build.locked(build_directory()):
        return cpp_extension.load(
            name=NAME,
            sources=[str(source) for source in [*sources, *sorted(HERE.glob("*.cpp"))]],
            extra_cflags=flags + sanitizers,
            extra_ldflags=sanitizers,
            extra_include_paths=[str(HERE), *_build.INCLUDE_DIRS],
            build_directory=str(build_directory()),
        )
