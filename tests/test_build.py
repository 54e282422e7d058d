"""The package builds just in time where there is no binary, and says what is wrong where it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")


def python(code: str, package_root: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code that imports the package from `package_root`, whatever else is installed."""
    # An editable install finds its binary for any copy of the package.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
    return subprocess.run(
        [sys.executable, "-c", alone + code],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=package_root,
        env={**os.environ, "PYTHONPATH": str(package_root), **environment},
    )


def test_builds_just_in_time_from_sources(tmp_path: Path) -> None:
    for name in ("lean_attention", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=IGNORED)
    code = (
        "import torch, lean_attention as la; print(la.__file__); "
        "q = torch.randn(1, 1, 2, 8); k = torch.randn(1, 5, 1, 8); print(la.decode(q, k, k)[0].shape)"
    )
    result = python(code, tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "torch.Size([1, 1, 2, 8])" in result.stdout
    assert "building the compiled core" in result.stderr
    again = python(code, tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert again.returncode == 0, again.stderr


def test_a_package_without_binary_and_sources_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lean_attention", tmp_path / "lean_attention", ignore=IGNORED)
    result = python("import lean_attention", tmp_path)
    assert result.returncode != 0
    assert "the compiled core lean_attention._C is missing" in result.stderr


def test_a_stale_lock_is_named(tmp_path: Path) -> None:
    for name in ("lean_attention", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=IGNORED)
    lock = tmp_path / "cache" / "lean_attention_C" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    result = python("import lean_attention", tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert result.returncode != 0
    assert str(lock) in result.stderr


def test_the_binary_runs_with_any_torch_from_its_target_on() -> None:
    """No symbol of torch beyond the stable C shim."""
    from lean_attention._core import core

    symbols = subprocess.run(["nm", "-D", "--undefined-only", core.__file__], capture_output=True, text=True)
    if symbols.returncode != 0:
        pytest.skip("nm is not available")
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert [name for name in names if "at4" in name or "c104" in name or "c103" in name] == []
    assert any(name.startswith("aoti_torch_") for name in names)
