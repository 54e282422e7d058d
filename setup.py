"""Builds lean_attention's compiled core with torch.utils.cpp_extension; pyproject.toml has the rest."""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch.utils.cpp_extension
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError:
    sys.exit(
        "lean_attention: building needs the torch that will run it; install torch first, "
        "then: pip install --no-build-isolation ."
    )

# Loaded by path: importing the package would import the core that is being built.
spec = importlib.util.spec_from_file_location(
    "_build", Path(__file__).resolve().parent / "lean_attention" / "_build.py"
)
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

toolkit = build.cuda_toolkit()
defines = ["-DLEAN_WITH_CUDA"] if toolkit else []
include_dirs = [*build.include_dirs(), *include_paths()]
libraries = ["c10", "torch", "torch_cpu"]
search = library_paths()
if toolkit:
    # A torch without CUDA knows no toolkit, and takes no hint from the environment.
    torch.utils.cpp_extension.CUDA_HOME = str(toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build.CUDA_ARCHITECTURES)
    include_dirs.append(str(toolkit / "include"))
    search = [*search, str(toolkit / "lib64")]
    libraries += ["cudart_static", "dl", "rt", "pthread"]
    print(f"lean_attention: with CUDA ({toolkit}) for {os.environ['TORCH_CUDA_ARCH_LIST']}", file=sys.stderr)
else:
    print("lean_attention: without CUDA", file=sys.stderr)

setup(
    ext_modules=[
        Extension(
            "lean_attention._C",
            sources=build.sources(cuda=toolkit is not None),
            include_dirs=include_dirs,
            library_dirs=search,
            libraries=libraries,
            extra_compile_args={"cxx": [*build.COMPILE_FLAGS, *defines], "nvcc": build.CUDA_FLAGS},
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
