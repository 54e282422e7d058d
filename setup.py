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

try:
    cuda = build.cuda_build()
except (RuntimeError, ValueError) as error:
    sys.exit(f"lean_attention: {error}")
defines = ["-DLEAN_WITH_CUDA"] if cuda else []
include_dirs = [*build.include_dirs(), *include_paths()]
libraries = ["c10", "torch", "torch_cpu"]
search = library_paths()
if cuda:
    # A torch without CUDA knows no toolkit, and takes no hint from the environment.
    torch.utils.cpp_extension.CUDA_HOME = str(cuda.toolkit)
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.architectures
    include_dirs.append(str(cuda.toolkit / "include"))
    search = [*search, str(cuda.toolkit / "lib64")]
    libraries += ["cudart_static", "dl", "rt", "pthread"]
    print(f"lean_attention: with CUDA ({cuda.toolkit}) for {cuda.architectures}", file=sys.stderr)
else:
    print("lean_attention: without CUDA", file=sys.stderr)


class BuildCore(BuildExtension):
    """Leaves it to ninja, which knows headers and flags, to find what has to be compiled again."""

    def finalize_options(self) -> None:
        # One folder for all ways to build: pip's editable builds would throw theirs away.
        self.build_temp = self.build_temp or str(Path("build", "objects"))
        super().finalize_options()
        self.force = True


setup(
    ext_modules=[
        Extension(
            "lean_attention._C",
            sources=build.sources(cuda=cuda is not None),
            include_dirs=include_dirs,
            library_dirs=search,
            libraries=libraries,
            extra_compile_args={"cxx": [*build.COMPILE_FLAGS, *defines], "nvcc": build.CUDA_FLAGS},
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
