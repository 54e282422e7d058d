"""Builds lean_attention's compiled core with torch.utils.cpp_extension; pyproject.toml has the rest."""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
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

setup(
    ext_modules=[
        Extension(
            "lean_attention._C",
            sources=build.sources(),
            include_dirs=[*build.include_dirs(), *include_paths()],
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu"],
            extra_compile_args=build.COMPILE_FLAGS,
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
