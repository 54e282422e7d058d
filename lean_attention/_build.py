"""How the compiled core is built: read by setup.py (ahead of time) and by the package (just in time)."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The oldest torch whose stable ABI the core uses; see torch/headeronly/version.h.
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10

COMPILE_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug information: nine tenths of what a build took on disk
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    # GCC's own AVX-512 headers trip these.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]


# Compute capabilities that an ahead-of-time build has machine code for, where TORCH_CUDA_ARCH_LIST does not
# say: Ampere, Ada, Hopper, Blackwell. The last one's PTX serves what comes after.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0a;12.0+PTX"

CUDA_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden,-fPIC",
    "-DLEAN_WITH_CUDA",
]


def sources(cuda: bool = False) -> list[str]:
    """Source files of the core, relative to the repository root."""
    csrc = ROOT / "csrc"
    found = [*csrc.rglob("*.cpp"), *(csrc.rglob("*.cu") if cuda else ())]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def cuda_toolkit() -> Path | None:
    """The CUDA toolkit to build with: CUDA_HOME, else that of the nvcc on the PATH, else the usual place.

    LEAN_ATTENTION_CUDA=0 builds without CUDA, =1 insists on it.

    Raises RuntimeError where LEAN_ATTENTION_CUDA=1 and there is none.
    """
    wanted = os.environ.get("LEAN_ATTENTION_CUDA", "")
    if wanted == "0":
        return None
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent.parent)
    places += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for place in places:
        if (place / "bin" / "nvcc").is_file() and (place / "lib64" / "libcudart_static.a").is_file():
            return place
    if wanted == "1":
        tried = ", ".join(map(str, places))
        raise RuntimeError(
            "lean_attention: LEAN_ATTENTION_CUDA=1, and no CUDA toolkit (bin/nvcc and "
            f"lib64/libcudart_static.a) is in any of {tried}; set CUDA_HOME"
        )
    return None


def include_dirs() -> list[str]:
    import pybind11

    return [str(ROOT / "csrc"), pybind11.get_include()]


def build_in_place() -> object:
    """Builds the core of a source checkout into torch's extension cache and returns the module.

    Raises ImportError where there are no sources.
    """
    if not (ROOT / "csrc" / "ops.cpp").is_file():
        raise ImportError(
            "lean_attention: the compiled core lean_attention._C is missing and its sources are not "
            f"beside the package ({ROOT}); reinstall with: pip install --no-build-isolation lean_attention"
        )
    from torch.utils import cpp_extension

    directory = Path(cpp_extension._get_build_directory("lean_attention_C", verbose=False))
    _refuse_stale_lock(directory / "lock")
    print(
        f"lean_attention: building the compiled core in {directory} (once; about a minute; for the "
        "CPU only: pip install --no-build-isolation . builds the CUDA kernels too)",
        file=sys.stderr,
    )
    return cpp_extension.load(
        name="_C",
        sources=[str(ROOT / source) for source in sources()],
        extra_cflags=COMPILE_FLAGS,
        extra_include_paths=include_dirs(),
        build_directory=str(directory),
        verbose=os.environ.get("LEAN_ATTENTION_VERBOSE_BUILD") == "1",
    )


def build_ops_library() -> Path:
    """Builds the ops alone, for the CPU, as a shared library for programs without Python; returns its path.

    From a source checkout, into torch's extension cache. Not in a process that has imported lean_attention:
    building also loads it, and the ops can be registered once. `python lean_attention/_build.py` does it.
    """
    from torch.utils import cpp_extension

    directory = Path(cpp_extension._get_build_directory("lean_attention_ops", verbose=False))
    _refuse_stale_lock(directory / "lock")
    cpp_extension.load(
        name="lean_attention_ops",
        sources=[str(ROOT / source) for source in sources() if not source.endswith("bindings.cpp")],
        extra_cflags=COMPILE_FLAGS,
        extra_include_paths=include_dirs(),
        build_directory=str(directory),
        is_python_module=False,
    )
    return directory / "lean_attention_ops.so"


def _refuse_stale_lock(lock: Path) -> None:
    """cpp_extension.load waits for a lock file without end, also where a killed build left it behind."""
    import time

    if lock.exists() and time.time() - lock.stat().st_mtime > 15 * 60:
        raise ImportError(
            f"lean_attention: another build has held {lock} for over 15 minutes; if none is running, "
            "delete that file and import again"
        )


if __name__ == "__main__":
    print(build_ops_library())
