"""How the compiled core is built: read by setup.py (ahead of time) and by the package (just in time)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


# Compute capabilities that an ahead-of-time build has machine code for, where nobody names others: Ampere,
# Ada, Hopper, Blackwell. It runs on later chips of the same major version too; PTX, which the driver
# compiles, serves what comes after. None ends in "a": such code runs on that chip alone.
CUDA_ARCHITECTURES = "8.0;8.9;9.0;10.0+PTX;12.0+PTX"
LEAST_COMPUTE_CAPABILITY = (8, 0)

CUDA_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden,-fPIC",
    "-DLEAN_WITH_CUDA",
]


def sources(cuda: bool = False) -> list[str]:
    """Source files of the core, relative to the repository root. The names of C++ files differ."""
    csrc = ROOT / "csrc"
    found = [*csrc.rglob("*.cpp"), *(csrc.rglob("*.cu") if cuda else ())]
    return sorted(str(path.relative_to(ROOT)) for path in found)


class CudaBuild(NamedTuple):
    """What the CUDA kernels are built with, and for what (as in TORCH_CUDA_ARCH_LIST)."""

    toolkit: Path
    architectures: str


def cuda_build() -> CudaBuild | None:
    """How an ahead-of-time build builds the CUDA kernels; None: it leaves them out.

    LEAN_ATTENTION_CUDA says what is wanted: 0 is no CUDA, 1 insists on it, "visible" takes the GPUs that
    this machine shows and no others, so that a development build compiles nothing that cannot run here.
    Unset, CUDA is built wherever there is a toolkit. TORCH_CUDA_ARCH_LIST names the architectures, and asks
    for CUDA.

    Raises RuntimeError where LEAN_ATTENTION_CUDA is 1 and there is no toolkit, ValueError where it is
    something else.
    """
    wanted = os.environ.get("LEAN_ATTENTION_CUDA", "")
    if wanted not in ("", "0", "1", "visible"):
        raise ValueError(f"LEAN_ATTENTION_CUDA is {wanted!r}; it must be 0, 1 or visible")
    if wanted == "0":
        return None
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted == "visible" and not architectures:
        architectures = visible_architectures()
        if not architectures:
            return None
    toolkit = cuda_toolkit()
    if toolkit is None:
        if wanted == "1":
            places = ", ".join(map(str, cuda_places()))
            raise RuntimeError(
                "LEAN_ATTENTION_CUDA is 1, and no CUDA toolkit (bin/nvcc and lib64/libcudart_static.a) is in "
                f"any of {places}; set CUDA_HOME"
            )
        return None
    return CudaBuild(toolkit, architectures or CUDA_ARCHITECTURES)


def visible_architectures() -> str:
    """Those of the GPUs that nvidia-smi shows and the kernels run on, as TORCH_CUDA_ARCH_LIST has them."""
    try:
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if shown.returncode != 0:
        return ""
    found = {tuple(map(int, pair)) for pair in re.findall(r"^\s*(\d+)\.(\d+)\s*$", shown.stdout, flags=re.M)}
    usable = sorted(capability for capability in found if capability >= LEAST_COMPUTE_CAPABILITY)
    return ";".join(f"{major}.{minor}" for major, minor in usable)


def cuda_places() -> list[Path]:
    """Where a CUDA toolkit may be: CUDA_HOME, beside the nvcc on the PATH, the usual places."""
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent.parent)
    return [*places, Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]


def cuda_toolkit() -> Path | None:
    """The first CUDA toolkit that is there."""
    for place in cuda_places():
        if (place / "bin" / "nvcc").is_file() and (place / "lib64" / "libcudart_static.a").is_file():
            return place
    return None


def include_dirs() -> list[str]:
    import pybind11

    return [str(ROOT / "csrc"), pybind11.get_include()]


def build_in_place() -> object:
    """Builds the core of a source checkout into torch's extension cache and returns the module.

    Raises ImportError where there are no sources.
    """
    if not (ROOT / "csrc" / "ops").is_dir():
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
