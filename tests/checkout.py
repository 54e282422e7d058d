"""Copies of this checkout, for tests that build."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")


def copy(to: Path, *folders: str) -> None:
    """Copies folders, without what was built.

    Of the CPU kernels the copy has the portable ones alone: those for vector instructions take nine tenths
    of the compiler's time, and building them again would show nothing more.
    """
    for folder in folders:
        shutil.copytree(ROOT / folder, to / folder, ignore=IGNORED)
    if "csrc" in folders:
        header = to / "csrc" / "cpu" / "kernels" / "registry.h"
        condition, text = "#if defined(__x86_64__)", header.read_text()
        assert text.count(condition) == 1, f"{header.name} decides in another way what is compiled"
        header.write_text(text.replace(condition, "#if 0"))


def quick_compiler(folder: Path) -> str:
    """One that optimises nothing, in half the time: the build is tested, not the code's speed."""
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)
