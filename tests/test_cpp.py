"""The ops from C++ programs: through the dispatcher, and in an exported layer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lean_attention._core import library
from tests import checkout


@pytest.mark.slow
def test_an_exported_layer_runs_without_python(tmp_path: Path) -> None:
    checkout.copy(tmp_path, "lean_attention", "examples")
    shutil.copy(library, tmp_path / "lean_attention")
    paths = {"PYTHONPATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    export = [sys.executable, str(tmp_path / "examples" / "cpp" / "export.py"), str(tmp_path / "layer")]
    made = subprocess.run(export, capture_output=True, text=True, env={**os.environ, **paths})
    assert made.returncode == 0, made.stderr
    command = made.stdout.strip().splitlines()[-1].split()
    assert all(part.startswith(str(tmp_path)) for part in command)
    linked = subprocess.run(["ldd", command[0], command[1]], capture_output=True, text=True).stdout
    assert "libtorch" in linked and "libpython" not in linked and "libtorch_python" not in linked
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "100 tokens: exported layer, op and PyTorch's attention differ by" in result.stdout
