"""What is released: the hub's kernel has relative imports, and old versions of glibc's symbols are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lean_attention._core import library
from release import hub_kernel, old_glibc


def test_a_kernel_of_the_hub_has_relative_imports_alone() -> None:
    for path, text in hub_kernel.modules().items():
        compile(text, path, "exec")
    assert (
        hub_kernel.relative("from lean_attention.ops import decode", "a/b.py") == "from ..ops import decode"
    )
    assert hub_kernel.relative("    from lean_attention import ops", "a.py") == "    from . import ops"
    with pytest.raises(ValueError, match=r"a\.py: 'import lean_attention\.ops' is not understood"):
        hub_kernel.relative("import lean_attention.ops", "a.py")


def test_a_kernel_of_the_hub_runs_on_ops_that_its_builder_has_loaded(tmp_path: Path) -> None:
    """As kernel-builder's module _ops, which loads the library under a name of its own, gives them."""
    hub_kernel.write_sources(tmp_path)
    kernel = tmp_path / "torch-ext" / "lean_attention"
    loads = f"import torch\ntorch.ops.load_library({str(library)!r})\nops = torch.ops.lean_attn\n"
    (kernel / "_ops.py").write_text(loads)
    code = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_hub_1", sys.argv[1])
kernel = sys.modules["_hub_1"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
q, k = torch.randn(1, 1, 2, 64), torch.randn(1, 9, 2, 64)
assert torch.allclose(kernel.decode(q, k, k)[0].double(), kernel.reference.decode(q, k, k)[0], atol=1e-5)
assert kernel.supports_flash_attn and "lean_attention" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(kernel / "__init__.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_glibc_has_an_older_version_of_what_changed() -> None:
    [libm] = old_glibc.output("cc", "-print-file-name=libm.so.6").split()
    found = {symbol.name: symbol for symbol in old_glibc.symbols(Path(libm))}
    if not found:
        pytest.skip("this system's C library is not glibc")
    assert found["log2"].is_old and found["log2"].version in ("2.2.5", "2.17")
    assert found["exp2f"].version == "2.27" and not found["exp2f"].is_old
    assert all(tuple(map(int, s.version.split("."))) <= old_glibc.OLDEST for s in found.values())
