"""Builds lean_attention's compiled core with torch.utils.cpp_extension; pyproject.toml has the rest."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import setuptools

NEEDS = "lean_attention: building needs torch 2.10 or newer"
WITHOUT = "install one first, or leave out --no-build-isolation"
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        "lean_attention: building needs setuptools 77 or newer, and this environment has "
        f"{setuptools.__version__}; {WITHOUT}"
    )
try:
    import torch
except ImportError:
    sys.exit(f"{NEEDS}, and this environment has none; {WITHOUT}")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    sys.exit(f"{NEEDS}, and this environment has {torch.__version__}; {WITHOUT}")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402


def module(path: str) -> ModuleType:
    """Loaded by path: importing the package would import the library that is being built."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).resolve().parent / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


build = module("lean_attention/_build.py")

try:
    cuda = build.cuda_build()
    if cuda:
        build.refuse_compiler(cuda)
except (RuntimeError, ValueError) as error:
    sys.exit(f"lean_attention: {error}")
# Of wheels for other machines (make wheel).
link_arguments = []
if os.environ.get("LEAN_ATTENTION_OLD_GLIBC") == "1":
    link_arguments = module("release/old_glibc.py").link_arguments(Path("build", "old_glibc"))
build.say(f"with CUDA ({cuda.toolkit}) for {cuda.architectures}" if cuda else "without CUDA")


class Wheel(bdist_wheel):
    """One for all Pythons: the library has no symbol of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setuptools.setup(
    ext_modules=[build.extension(cuda, Path("build", "kernels"), link_arguments)],
    cmdclass={"build_ext": build.build_command(cuda), "bdist_wheel": Wheel},
)
