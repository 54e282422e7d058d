"""Makes a kernel of the Hugging Face hub from the same sources: `make hub-kernel`.

    python -m release.hub_kernel build/hub

The folder is a kernel's repository: `kernels.get_local_kernel` loads it as it is, from build/<variant>, and
build.toml, csrc and torch-ext are what kernel-builder takes. Its ops are in a namespace of their own, named
after the sources, so that kernels and the package can be loaded beside each other. Imports are relative: the
hub names the module.

It links the objects of the package's build with ops that are compiled anew, for their names: `setup.py
build_ext` comes before.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

from lean_attention import _build
from release import old_glibc

ROOT = _build.ROOT
PACKAGE = ROOT / "lean_attention"
NAME = "lean-attention"
VERSION = 1  # the hub counts versions of a kernel's interface
MODULE = "lean_attention"

# It has no command line, is not built just in time, and vLLM finds packages only.
LEFT_OUT = ("__main__.py", "_build.py", "tools/", "integrations/vllm/")

NAMESPACE = 'NAMESPACE = "lean_attn"'  # in _core.py

NO_BUILD = '''"""A kernel of the hub is not built just in time."""


def build_in_place():
    raise ImportError("lean_attention: the kernel's library is missing; get it from the hub again")
'''

INTERFACE = '''

supports_flash_attn = True


def flash_attn_forward(module, query, key, value, attention_mask, **options):
    """transformers' attention interface, for ``attn_implementation="org/name"``."""
    from .integrations.transformers.attention import attention

    return attention(module, query, key, value, attention_mask, **options)
'''

BINDING = """// What kernel-builder loads the library by.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""


def relative(text: str, path: str) -> str:
    """A module of the package, at `path` in it, with relative imports."""
    dots = "." * len(Path(path).parts)
    text = re.sub(r"^(\s*)from lean_attention import", rf"\1from {dots} import", text, flags=re.M)
    text = re.sub(r"^(\s*)from lean_attention\.(\S+) import", rf"\1from {dots}\2 import", text, flags=re.M)
    text = re.sub(r"^import lean_attention$", f"from {dots} import ops as lean_attention", text, flags=re.M)
    if absolute := re.search(r"^\s*(from|import) lean_attention.*$", text, flags=re.M):
        raise ValueError(f"{path}: {absolute[0].strip()!r} is not understood")
    return text


def modules() -> dict[str, str]:
    """The kernel's Python files, by their path in it; names of ops are the package's yet."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE).as_posix()
        if not path.startswith(LEFT_OUT):
            found[path] = relative(file.read_text(), path)
    found["_build.py"] = NO_BUILD
    found["__init__.py"] += INTERFACE
    return found


def namespace(backend: str) -> str:
    """Another one for every change of what the kernel is made of."""
    made_of = hashlib.sha256(repr(sorted(modules().items())).encode())
    for file in sorted((ROOT / "csrc").rglob("*.*")):
        made_of.update(file.name.encode() + file.read_bytes())
    return f"_{MODULE}_{backend}_{made_of.hexdigest()[:8]}"


def link(cuda: _build.CudaBuild | None, name: str, library: Path, work: Path) -> None:
    """The package's library with its ops in the namespace `name`."""
    objects = ROOT / "build" / ("objects_cuda" if cuda else "objects")
    sources = _build.sources(cuda=cuda is not None)
    ops = [source for source in sources if source.startswith("csrc/ops/")]
    include = [*_build.INCLUDE_DIRS, *cpp_extension.include_paths()]
    defines = [f"-DLEAN_OP_LIBRARY={name}", *(["-DLEAN_WITH_CUDA"] if cuda else [])]
    if cuda:
        include.append(str(cuda.toolkit / "include"))
    compiler = os.environ.get("CXX", "c++")
    work.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> str:
        to = str(work / f"{Path(source).stem}.o")
        flags = ["-fPIC", "-w", *_build.COMPILE_FLAGS, *defines, *(f"-I{path}" for path in include)]
        subprocess.run([compiler, *flags, "-c", str(ROOT / source), "-o", to], check=True)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        anew = list(pool.map(compiled, ops))
    kept = [str(objects / source) for source in sources if source not in ops]
    if cuda:
        kept += _build.write_kernel_sources(Path("build", "kernels"))
        kept = [path if Path(path).is_absolute() else str(objects / path) for path in kept]
    kept = [re.sub(r"\.(cpp|cu)$", ".o", path) for path in kept]
    paths = [*cpp_extension.library_paths(), *([str(cuda.toolkit / "lib64")] if cuda else [])]
    libraries = ["c10", "torch_cpu", *(_build.CUDA_LIBRARIES if cuda else [])]
    end = [*(f"-L{path}" for path in paths), *(f"-l{name}" for name in libraries)]
    end += old_glibc.link_arguments(ROOT / "build" / "old_glibc")
    subprocess.run([compiler, "-shared", "-o", str(library), *anew, *kept, *end], check=True)


def build_toml(architectures: str) -> str:
    """What kernel-builder reads. Files of kernels that it cannot generate are listed."""

    def listed(names: list[str]) -> str:
        return "[\n" + "".join(f'    "{name}",\n' for name in names) + "]"

    cxx, nvcc = _build.sources(), [source for source in _build.sources(cuda=True) if source.endswith(".cu")]
    capabilities = sorted({name.removesuffix("+PTX") for name in architectures.split(";")}, key=float)
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    kernels = [f"kernels/{Path(path).name}" for path in _build.write_kernel_sources(Path("build", "kernels"))]
    ops = [source for source in cxx if source.startswith("csrc/ops/")]
    rest = [source for source in cxx if source not in ops]
    flags = [flag for flag in _build.COMPILE_FLAGS if flag not in ("-O3", "-g0")]
    flags = [
        *(f for f in flags if not f.startswith(("-W", "-DTORCH"))),
        "-DLEAN_OP_LIBRARY=TORCH_EXTENSION_NAME",
    ]
    return f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "MIT"
backends = ["cpu", "cuda"]

[torch]
include = ["csrc"]
cxx-flags = {listed(flags)}
src = {listed(["torch-ext/torch_binding.cpp", *ops, *headers])}

[torch.stable-abi]
cpu = "2.10"
cuda = "2.10"

[kernel.{MODULE}_cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {listed(flags)}
src = {listed([*rest, *headers])}

[kernel.{MODULE}_cuda]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = {json.dumps(capabilities)}
include = ["csrc"]
cxx-flags = {listed([*flags, "-DLEAN_WITH_CUDA"])}
src = {listed([*rest, *nvcc, *kernels, *headers])}
"""


def write_variant(folder: Path, name: str, backend: str) -> None:
    """What the hub's users load, but for the library."""
    for path, text in modules().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text.replace(NAMESPACE, f'NAMESPACE = "{name}"'))
    metadata = {
        "id": name,
        "name": NAME,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_sources(folder: Path) -> None:
    """What kernel-builder makes variants of: its own _ops.py loads the library and names the ops."""
    generated = "from ._ops import ops as _ops\n\nNAMESPACE = _ops.name"
    for path, text in modules().items():
        to = folder / "torch-ext" / MODULE / path
        to.parent.mkdir(parents=True, exist_ok=True)
        text = text.replace(NAMESPACE, generated)
        to.write_text(text.replace("\nlibrary = _load()\n", "\nlibrary = Path(__file__).parent\n"))
    (folder / "torch-ext" / "torch_binding.cpp").write_text(BINDING)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    _build.write_kernel_sources(folder / "kernels")
    (folder / "build.toml").write_text(build_toml(_build.CUDA_ARCHITECTURES))
    for file in ("LICENSE", "README.md"):
        shutil.copy(ROOT / file, folder)


def main(folder: Path) -> None:
    folder = folder.resolve()
    os.chdir(ROOT)
    cuda = _build.cuda_build()
    backend, tag = "cpu", "cpu"
    if cuda:
        shown = subprocess.run([cuda.toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True)
        backend, tag = "cuda", "cu" + "".join(re.search(r"release (\d+)\.(\d+)", shown.stdout).groups())
    name = namespace(backend)
    shutil.rmtree(folder, ignore_errors=True)
    variant = folder / "build" / f"torch-stable-abi210-{tag}-{platform.machine()}-linux"
    write_variant(variant, name, backend)
    write_sources(folder)
    link(cuda, name, variant / "_C.so", ROOT / "build" / "hub_objects" / backend)
    print(f"{variant}: ops in torch.ops.{name}, {(variant / '_C.so').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
