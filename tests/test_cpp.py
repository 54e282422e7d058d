"""The ops from C++ programs: through the dispatcher, and in an exported layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXPORT = Path(__file__).resolve().parent.parent / "examples" / "cpp" / "export.py"


def test_an_exported_layer_runs_without_python(tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, str(EXPORT), str(tmp_path)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    command = made.stdout.strip().splitlines()[-1].split()
    linked = subprocess.run(["ldd", command[0], command[1]], capture_output=True, text=True).stdout
    assert "libtorch" in linked and "libpython" not in linked and "libtorch_python" not in linked
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "100 tokens: exported layer, op and PyTorch's attention differ by" in result.stdout
