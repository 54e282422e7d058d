"""The CUDA kernels on an emulated device: their own sources, compiled for the host.

:func:`load` builds them once into torch's extension cache (about a minute) and registers
``torch.ops.lean_attn_emulated``, which takes CPU tensors and runs them through the CUDA backend.
LEAN_ATTENTION_EMULATION_SANITIZE=1 builds with AddressSanitizer and UBSan; `make sanitize` does, and preloads
what they need.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


@functools.cache
def load() -> ModuleType:
    from torch.utils import cpp_extension

    from lean_attention import _build

    sanitize = os.environ.get("LEAN_ATTENTION_EMULATION_SANITIZE") == "1"
    flags = [flag for flag in _build.COMPILE_FLAGS if flag != "-O3"]
    flags += ["-O1", "-g1", "-DLEAN_EMULATED", "-Wno-unknown-pragmas"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
    name = "lean_attention_emulated"
    directory = cpp_extension._get_build_directory(name + "_sanitized" * sanitize, verbose=False)
    sources = [_build.ROOT / source for source in _build.sources() if not source.endswith("bindings.cpp")]
    return cpp_extension.load(
        name=name,
        sources=[str(source) for source in [*sources, *sorted(HERE.glob("*.cpp"))]],
        extra_cflags=flags + sanitizers,
        extra_ldflags=sanitizers,
        extra_include_paths=[*_build.include_dirs(), str(HERE)],
        build_directory=directory,
    )
