"""Installs a wheel into fresh environments and runs release/smoke.py in each: `make wheel-check`.

    python -m release.wheel_check dist/lean_attention-*.whl [CELL ...]

A cell is a Python and a torch; "cpu" stands for those whose torch is built for CPUs, "all" (the default)
for all. Environments are made one at a time and deleted: a torch with CUDA takes several GB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from release.wheel import LIBRARY, TORCH_LIBRARIES, needed_from_torch, symbols

HERE = Path(__file__).resolve().parent
NEEDED_GB = {True: 3, False: 12}  # of a cell with a torch for CPUs, or with CUDA
DRAWS = "matplotlib"


class Cell(NamedTuple):
    python: str
    torch: str  # as pip is told
    cpu: bool = False

    def __str__(self) -> str:
        return f"{self.python}-{self.torch.removeprefix('torch').removeprefix('==') or 'newest'}"


CELLS = [
    Cell("3.11", "torch==2.13.0+cpu", cpu=True),
    Cell("3.12", "torch==2.13.0+cpu", cpu=True),
    Cell("3.11", "torch==2.10.0"),
    Cell("3.11", "torch"),
    Cell("3.10", "torch==2.11.0"),
    Cell("3.12", "torch==2.12.1"),
    Cell("3.13", "torch==2.14.1"),
]


class LeftOut(Exception):
    """A cell cannot run here, for this reason."""


def interpreter(version: str) -> str:
    """A Python of this version, from the PATH or pyenv."""
    found = [
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for candidate in filter(None, found):
        asked = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == version:
            return candidate
    raise LeftOut(f"there is no Python {version} here")


def install(python: Path, *what: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
        raise LeftOut(f"pip does not install {' '.join(what)}: {said[0]}")


def run(cell: Cell, wheel: Path, folder: Path) -> bool:
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED_GB[cell.cpu]:
        raise LeftOut(f"it needs {NEEDED_GB[cell.cpu]} GB of disk, and {free:.0f} GB are free")
    subprocess.run([interpreter(cell.python), "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    begin = time.monotonic()
    install(python, cell.torch)
    install(python, str(wheel.resolve()), DRAWS)
    print(f"installed in {time.monotonic() - begin:.0f} s", flush=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, HERE / "smoke.py"], cwd=folder, env=clean)
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    library = packages / LIBRARY
    has: set[str] = set()
    for name in TORCH_LIBRARIES:
        has |= {symbol for symbol, defined in symbols(packages / "torch" / "lib" / name).items() if defined}
    missing = sorted(needed_from_torch(library) - has)
    print(f"symbols without a version that this torch lacks: {' '.join(missing) or 'none'}", flush=True)
    return done.returncode == 0 and not missing


def main(wheel: Path, names: list[str]) -> None:
    chosen = [cell for cell in CELLS if "all" in names or str(cell) in names or ("cpu" in names and cell.cpu)]
    if not chosen:
        sys.exit(f"wheel-check: no such cell (cells: all cpu {' '.join(map(str, CELLS))})")
    results = {}
    for cell in chosen:
        print(f"== Python {cell.python}, {cell.torch}", flush=True)
        with tempfile.TemporaryDirectory(prefix="wheel-check-") as folder:
            try:
                results[cell] = "passed" if run(cell, wheel, Path(folder)) else "FAILED"
            except LeftOut as reason:
                results[cell] = f"left out: {reason}"
    for cell in CELLS:
        print(f"wheel-check {cell}: {results.get(cell, 'left out: not asked for')}")
    print("wheel-check 3.14: its symbols and tag are right (make wheel)")
    if "FAILED" in results.values():
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["all"])
