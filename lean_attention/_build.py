"""How the compiled core is built: read by setup.py (ahead of time) and by the package (just in time)."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from setuptools import Extension
    from torch.utils.cpp_extension import BuildExtension

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
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]


def sources(cuda: bool = False) -> list[str]:
    """Source files of the core, relative to the repository root. The names of C++ files differ."""
    csrc = ROOT / "csrc"
    found = [*csrc.rglob("*.cpp"), *(csrc.rglob("*.cu") if cuda else ())]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def write_kernel_sources(directory: Path) -> list[str]:
    """Writes a source for each decode kernel of kernel_list.h; returns their paths, slow ones first."""
    listed = (ROOT / "csrc" / "cuda" / "decode" / "kernel_list.h").read_text()
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for arguments in reversed(re.findall(r"^LEAN_DECODE_KERNEL\((.*)\)$", listed, flags=re.M)):
        for dtype in ("BFloat16", "Half"):
            path = directory / f"decode_{dtype}_{arguments.replace(', ', '_')}.cu"
            text = (
                '#include "cuda/decode/decode_kernel.h"\n\nnamespace lean::cuda {\n'
                f"LEAN_DEFINE_DECODE_KERNEL({dtype}, {arguments})\n}}\n"
            )
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            paths.append(str(path))
    return paths


class CudaBuild(NamedTuple):
    """What the CUDA kernels are built with, and for what (as in TORCH_CUDA_ARCH_LIST)."""

    toolkit: Path
    architectures: str


def cuda_build(unset: str = "") -> CudaBuild | None:
    """How a build builds the CUDA kernels; None: it leaves them out.

    LEAN_ATTENTION_CUDA says what is wanted: 0 is no CUDA, 1 insists on it, "visible" takes the GPUs that
    this machine shows and no others, so that a development build compiles nothing that cannot run here.
    Where it is not set it is `unset`, by default: CUDA wherever there is a toolkit. TORCH_CUDA_ARCH_LIST
    names the architectures, and asks for CUDA.

    Raises RuntimeError where LEAN_ATTENTION_CUDA is 1 and there is no toolkit, ValueError where it is
    something else.
    """
    wanted = os.environ.get("LEAN_ATTENTION_CUDA") or unset
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


INCLUDE_DIRS = [str(ROOT / "csrc")]


def refuse_compiler(cuda: CudaBuild) -> None:
    """Raises RuntimeError where the toolkit does not take the C++ compiler: it refuses newer ones."""
    compiler = os.environ.get("CC")  # as torch.utils.cpp_extension chooses it
    chosen = ["-ccbin", compiler] if compiler else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        command = [str(cuda.toolkit / "bin" / "nvcc"), *chosen, "-c", str(source), "-o", f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    said = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    why = next((line for line in said if "error" in line), said[-1])
    raise RuntimeError(
        f"the CUDA toolkit in {cuda.toolkit} does not take the C++ compiler {compiler or 'on the PATH'} "
        f"({why.strip()}); name one that it takes by CC=, or leave the kernels out by LEAN_ATTENTION_CUDA=0"
    )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[TextIO]:
    """Has the folder, which it makes, to itself: of all processes that build there, one goes on at a time.

    The lock ends with its process, however that ends. cpp_extension.load has one of its own, a file that a
    killed build leaves behind and that is waited for without end.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "build.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds in {directory}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        yield lock


def say(text: str) -> None:
    """To standard error, unless a program configures the logger: a build takes minutes."""
    logging.getLogger("lean_attention").warning("lean_attention: %s", text)


def extension(cuda: CudaBuild | None, directory: Path, link_arguments: Sequence[str] = ()) -> Extension:
    """The core, as BuildExtension is to compile it; tells torch of the toolkit and the architectures.

    `directory` is where the sources of kernels are written; `link_arguments` end the linker's command line.
    """
    from setuptools import Extension
    from torch.utils import cpp_extension

    defines = cpu_defines()
    include = [*INCLUDE_DIRS, *cpp_extension.include_paths()]
    search, libraries = cpp_extension.library_paths(), ["c10", "torch", "torch_cpu"]
    if cuda:
        # A torch without CUDA knows no toolkit, and takes no hint from the environment.
        cpp_extension.CUDA_HOME = str(cuda.toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.architectures
        defines.append("-DLEAN_WITH_CUDA")
        include.append(str(cuda.toolkit / "include"))
        search = [*search, str(cuda.toolkit / "lib64")]
        libraries += CUDA_LIBRARIES
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    return Extension(
        "lean_attention._C",
        sources=[*(write_kernel_sources(directory) if cuda else ()), *sources(cuda=cuda is not None)],
        include_dirs=include,
        library_dirs=search,
        libraries=libraries,
        extra_compile_args={"cxx": [*COMPILE_FLAGS, *defines], "nvcc": CUDA_FLAGS},
        extra_link_args=list(link_arguments),
        language="c++",
    )


def cpu_defines() -> list[str]:
    """Of LEAN_ATTENTION_CPU_KERNELS=portable: no kernels for vector instructions, which take nine tenths of
    the compiler's time. For builds whose CPU kernels nobody runs."""
    wish = os.environ.get("LEAN_ATTENTION_CPU_KERNELS", "all")
    if wish not in ("all", "portable"):
        raise ValueError(f"LEAN_ATTENTION_CPU_KERNELS is {wish!r}; it must be all or portable")
    return ["-DLEAN_PORTABLE_ONLY"] if wish == "portable" else []


def build_command(cuda: CudaBuild | None) -> type[BuildExtension]:
    """The command build_ext. ninja, which knows headers and flags, finds what has to be compiled again."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildCore(BuildExtension):
        def finalize_options(self) -> None:
            # One folder for all ways to build: pip's editable builds would throw theirs away.
            folder = "objects_cuda" if cuda else "objects"
            self.build_temp = self.build_temp or str(Path("build", folder))
            super().finalize_options()
            self.force = True

        def get_ext_filename(self, name: str) -> str:
            # No Python's name is in it: it is no module, and serves them all.
            return str(Path(*name.split(".")).with_suffix(".so"))

    return BuildCore


def compile_core(directory: Path) -> None:
    """Compiles the core into directory/lean_attention, as setup.py would."""
    from setuptools import Distribution

    os.chdir(ROOT)  # sources are relative to it
    cuda = cuda_build()
    if cuda:
        refuse_compiler(cuda)
    ours = {"name": "lean_attention", "ext_modules": [extension(cuda, directory / "kernels")]}
    command = Distribution({**ours, "cmdclass": {"build_ext": build_command(cuda)}}).get_command_obj(
        "build_ext"
    )
    command.build_lib, command.build_temp = str(directory), str(directory / "objects")
    command.ensure_finalized()
    command.run()


def other_copies() -> list[Path]:
    """Binaries of the package elsewhere on sys.path, as that of an installed wheel is to a checkout."""
    binaries = [Path(folder, "lean_attention", "_C.so").resolve() for folder in sys.path]
    return [binary for binary in binaries if binary.exists() and binary.parent.parent != ROOT]


def build_in_place() -> Path:
    """The library of a source checkout, in torch's extension cache; built there unless it is up to date.

    With the CUDA kernels for the GPUs that this machine shows, or those of TORCH_CUDA_ARCH_LIST, where there
    is a toolkit. Raises ImportError where there are no sources, or where they do not compile.
    """
    if not (ROOT / "csrc" / "ops").is_dir():
        raise ImportError(
            "lean_attention: the compiled library lean_attention/_C.so is missing or not wanted "
            f"(LEAN_ATTENTION_JIT=1), and its sources are not beside the package ({ROOT}); install it again: "
            "pip install --force-reinstall --no-deps lean_attention"
        )
    from torch.utils import cpp_extension

    cuda = cuda_build(unset="visible")
    name = "lean_attention_C_cuda" if cuda else "lean_attention_C"
    directory = Path(cpp_extension._get_build_directory(name, verbose=False)).resolve()
    made_of, wanted = directory / "made_of", fingerprint(cuda)
    with locked(directory) as lock:
        if not made_of.exists() or made_of.read_text() != wanted:
            for other in other_copies():
                say(f"the package in {ROOT} comes before the built one, {other}, on sys.path, and is taken")
            made_of.unlink(missing_ok=True)
            run_compiler(directory, cuda, lock)
            made_of.write_text(wanted)
    return directory / "lean_attention" / "_C.so"


def fingerprint(cuda: CudaBuild | None) -> str:
    """Another one for every change of what the core is made of."""
    import torch

    found = hashlib.sha256(repr((torch.__version__, os.environ.get("CXX"), cpu_defines(), cuda)).encode())
    for file in [Path(__file__), *sorted((ROOT / "csrc").rglob("*.*"))]:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def run_compiler(directory: Path, cuda: CudaBuild | None, lock: TextIO) -> None:
    """Runs compile_core in a process of its own, and says how far it is."""
    chosen = {"LEAN_ATTENTION_CUDA": "0"}
    if cuda:
        chosen = {
            "LEAN_ATTENTION_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": cuda.architectures,
            "CUDA_HOME": str(cuda.toolkit),
        }
    targets = f"the CPU and CUDA {cuda.architectures}" if cuda else "the CPU only"
    minutes = "a few minutes" if cuda else "about a minute"
    say(f"building the compiled core for {targets} in {directory} (once; {minutes})")
    verbose = os.environ.get("LEAN_ATTENTION_VERBOSE_BUILD") == "1"
    last, told = collections.deque(maxlen=40), time.monotonic()
    with subprocess.Popen(
        [sys.executable, __file__, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **chosen},
        pass_fds=[lock.fileno()],  # the folder is not free before the compiler is done, whoever waits for it
    ) as compiler:
        for line in compiler.stdout:
            last.append(line)
            if verbose:
                sys.stderr.write(line)
            elif (done := re.match(r"\[(\d+)/(\d+)\].*?((?:csrc|kernels)/\S+\.(?:cpp|cu))\b", line)) and (
                sys.stderr.isatty() or time.monotonic() - told > 10
            ):
                told = time.monotonic()
                say(f"compiled {done[1]} of {done[2]} files, the last one {done[3]}")
    if compiler.returncode != 0:
        without = "; LEAN_ATTENTION_CUDA=0 builds for the CPU only" if cuda else ""
        raise ImportError(
            f"lean_attention: the compiled core could not be built for {targets}{without}\n{''.join(last)}"
        )


if __name__ == "__main__":
    compile_core(Path(sys.argv[1]))
