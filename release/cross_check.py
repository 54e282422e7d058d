"""Compiles the CPU's sources for another processor, aarch64 by default: `make cross-check`.

    python -m release.cross_check [COMPILER]

Nothing runs: it shows that the sources go on being for more than x86-64. On Arm decode has portable kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

from lean_attention import _build

DEFAULT = "aarch64-linux-gnu-g++"


def main(compiler: str) -> None:
    if shutil.which(compiler) is None:
        install = "; on Debian: apt-get install g++-aarch64-linux-gnu" if compiler == DEFAULT else ""
        print(f"cross-check: left out, there is no {compiler} here{install}")
        return
    begin = time.monotonic()
    include = [f"-I{path}" for path in [*_build.INCLUDE_DIRS, *cpp_extension.include_paths()]]
    flags = [flag for flag in _build.COMPILE_FLAGS if flag != "-O3"]
    sources = _build.sources()
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: str) -> subprocess.CompletedProcess:
            to = Path(folder, source.replace("/", "_") + ".o")
            command = [
                compiler,
                *flags,
                *include,
                "-O1",
                "-fPIC",
                "-c",
                str(_build.ROOT / source),
                "-o",
                str(to),
            ]
            return subprocess.run(command, capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = dict(zip(sources, pool.map(compiled, sources), strict=True))
        failed = {source: result for source, result in done.items() if result.returncode != 0}
        for source, result in failed.items():
            print(f"cross-check: {compiler} does not compile {source}\n{result.stderr}")
        if not failed:
            library = str(Path(folder, "_C.so"))
            subprocess.run(
                [compiler, "-shared", "-o", library, *map(str, Path(folder).glob("*.o"))], check=True
            )
            table = subprocess.run(
                ["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True
            )
            failed = re.findall(r" UND (_ZN\w*4lean\w+)", table.stdout)
            for name in failed:
                print(f"cross-check: nothing that {compiler} compiles defines {name}")
    if failed:
        sys.exit(1)
    print(
        f"cross-check: {compiler} compiles and links {len(sources)} files ({time.monotonic() - begin:.0f} s)"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT)
