"""Builds lean_attention's compiled core with torch.utils.cpp_extension; pyproject.toml has the rest."""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    import torch  # noqa: F401
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

try:
    cuda = build.cuda_build()
except (RuntimeError, ValueError) as error:
    sys.exit(f"lean_attention: {error}")
build.say(f"with CUDA ({cuda.toolkit}) for {cuda.architectures}" if cuda else "without CUDA")


class Wheel(bdist_wheel):
    """One for all Pythons: the library has no symbol of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[build.extension(cuda, Path("build", "kernels"))],
    cmdclass={"build_ext": build.build_command(), "bdist_wheel": Wheel},
)
