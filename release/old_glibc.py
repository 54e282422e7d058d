"""Links a library so that it runs with a glibc that is older than the one that it is built with.

A linker takes the newest version of each symbol that the glibc at hand has. Stub libraries that have older
versions of the symbols come before it on the command line, and are taken instead: the result is that of a
build on an old system. What was added later as a new symbol the library defines for itself.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

OLDEST = (2, 28)

# Where an old glibc has the symbols that 2.34 moved into libc, by the beginning of their names.
LIBRARIES = {
    "dl": "libdl.so.2",
    "pthread_": "libpthread.so.0",
    "sem_": "libpthread.so.0",
    "shm_": "librt.so.1",
}

# Since 2.32: libstdc++'s headers ask it whether atomic instructions can be left out. 0: there may be more.
SINGLE_THREADED = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def link_arguments(directory: Path) -> list[str]:
    """Builds the stubs in `directory`; returns what they add to the end of a link's command line."""
    directory.mkdir(parents=True, exist_ok=True)
    stubs: dict[str, list[Symbol]] = {}
    # A stub has all of its library: the linker opens one library of a name, and no other.
    for name in ("libc.so.6", "libm.so.6"):
        for symbol in symbols(Path(output("cc", f"-print-file-name={name}").strip())):
            moved = next((to for start, to in LIBRARIES.items() if symbol.name.startswith(start)), name)
            stubs.setdefault(moved if symbol.is_old else name, []).append(symbol)
    own = directory / "single_threaded.c"
    own.write_text(SINGLE_THREADED)
    subprocess.run(["cc", "-O2", "-fPIC", "-c", own, "-o", own.with_suffix(".o")], check=True)
    libraries = [stub(directory, soname, found) for soname, found in sorted(stubs.items())]
    return [str(own.with_suffix(".o")), "-Wl,--as-needed", *map(str, libraries)]


class Symbol(NamedTuple):
    name: str
    version: str
    is_old: bool  # a linker would take a newer one
    is_function: bool


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(library: Path) -> list[Symbol]:
    """Each symbol that a linker takes, in its newest version that is old enough, where there is one."""
    table = output("readelf", "--dyn-syms", "--wide", str(library))
    line = r"\s(FUNC|IFUNC|OBJECT) .* (\w+)(@@?)GLIBC_([\d.]+)$"
    versions: dict[str, dict[tuple[int, ...], tuple[bool, bool]]] = {}
    for kind, name, mark, version in re.findall(line, table, flags=re.M):
        numbers = tuple(map(int, version.split(".")))
        versions.setdefault(name, {})[numbers] = (mark == "@@", kind != "OBJECT")
    found = []
    for name, of in versions.items():
        old = max((version for version in of if version <= OLDEST), default=None)
        if old and any(is_default for is_default, _ in of.values()):
            found.append(Symbol(name, ".".join(map(str, old)), not of[old][0], of[old][1]))
    return found


def stub(directory: Path, soname: str, found: list[Symbol]) -> Path:
    """A shared library that has these symbols in these versions, and nothing else."""
    source, script, library = (directory / f"{soname}{end}" for end in (".c", ".map", ""))
    source.write_text(
        "".join(f"void {s.name}(void) {{}}\n" if s.is_function else f"char {s.name}[8];\n" for s in found)
    )
    by_version: dict[str, list[str]] = {}
    for symbol in found:
        by_version.setdefault(symbol.version, []).append(symbol.name)
    script.write_text(
        "".join(
            f"GLIBC_{version} {{ global: {'; '.join(names)}; }};\n"
            for version, names in sorted(by_version.items())
        )
    )
    options = ["-shared", "-nostdlib", "-fPIC", "-ffreestanding", "-w"]
    subprocess.run(
        ["cc", *options, f"-Wl,-soname,{soname},--version-script,{script}", source, "-o", library], check=True
    )
    return library
