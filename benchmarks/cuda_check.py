"""What nvcc has made of the CUDA kernels: `make cuda-check`. Needs a toolkit to build the core, no GPU.

    python -m benchmarks.cuda_check build/cuda/lean_attention/_C.*.so

Reads each architecture's machine code out of that core, prints registers, shared memory, spills and the
resident CTAs that follow, and fails where a kernel spills, lacks the instructions it is built on, or does not
fit an SM.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import print_whole

# Per SM, CUDA C++ programming guide, table of technical specifications: shared memory in KB, of which the
# system takes 1 KB per CTA; resident threads. Registers are 65536 everywhere.
SHARED_KB = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "103": 228, "110": 228, "120": 100}
REGISTERS = 65536

# SASS: tensor-core product, asynchronous copy to shared memory, matrix load.
WANTED = ("HMMA", "LDGSTS", "LDSM")
SPILLS = ("LDL", "STL")
# Bytes per thread. head_dim 512 takes all registers, and on Blackwell a few values more; letting four warps
# instead of two share its dims would avoid that, and read K twice as often.
STACK_ALLOWED = 32


@dataclass(frozen=True)
class Kernel:
    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    rows: int
    quantised: bool  # its caches
    registers: int
    stack: int
    counts: dict[str, int]
    shared_bytes: int
    bytes_in_flight: int
    threads: int

    @property
    def ctas_per_sm(self) -> int:
        per_thread = -(-self.registers // 8) * 8
        by_registers = REGISTERS // (per_thread * self.threads)
        return min(by_registers, SHARED_KB[self.arch] * 1024 // (self.shared_bytes + 1024))

    def problems(self) -> list[str]:
        found = [f"no {name} in its SASS" for name in WANTED if not self.counts[name]]
        if self.stack > STACK_ALLOWED:
            spills = ", ".join(f"{self.counts[name]} {name}" for name in SPILLS)
            found.append(f"a stack frame of {self.stack} bytes ({spills})")
        if self.ctas_per_sm < 1:
            found.append("does not fit an SM")
        return found


def tool(name: str) -> str:
    """A binary of the nvidia-cuda-* packages, which lie beside Python's own packages."""
    for path in Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"):
        return str(path)
    sys.exit(f"cuda-check: {name} is missing; pip install -r third_party/cuda-check-requirements.txt")


def kernel_facts(library: Path) -> dict[tuple, list]:
    """Threads, shared memory and bytes in flight of each kernel of a core, by what it is for.

    In a process of its own: this one has the installed core, and torch takes the ops from one only.
    """
    code = (
        "import importlib.util, json, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('lean_attention._C', sys.argv[1])\n"
        "core = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(core)\n"
        "print(json.dumps(core.cuda_kernels()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(library.resolve())], capture_output=True, text=True
    )
    if result.returncode != 0:
        sys.exit(f"cuda-check: {library} does not load\n{result.stderr}")
    return {tuple(row[:5]): row[5:] for row in json.loads(result.stdout)}


def disassemble(library: Path, *options: str) -> str:
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}
    command = [tool("cuobjdump"), *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def architectures_of(library: Path) -> list[str]:
    return sorted(set(re.findall(r"\.sm_(\w+)\.cubin", disassemble(library, "-lelf"))), key=int)


def read_kernels(library: Path, facts: dict[tuple, list], arch: str) -> list[Kernel]:
    only = ("-arch", f"sm_{arch}")
    resources = dict(re.findall(r"Function (\w+):\s*\n\s*(.*)", disassemble(library, *only, "-res-usage")))
    kernels = []
    for function in disassemble(library, *only, "-sass").split("Function : ")[1:]:
        name = function.split(None, 1)[0]
        shape = re.search(r"(__half|__nv_bfloat16)Li(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", name)
        if shape is None or "decode_kernel" not in name:
            continue
        usage = dict(re.findall(r"(\w+):(\d+)", resources[name]))
        dtype = {"__half": "float16", "__nv_bfloat16": "bfloat16"}[shape[1]]
        head_dim, head_dim_v, row_tiles, element_bytes = map(int, shape.groups()[1:])
        rows, quantised = 16 * row_tiles, element_bytes == 1
        threads, shared_bytes, in_flight = facts[(dtype, head_dim, head_dim_v, rows, quantised)]
        counts = {key: len(re.findall(rf"\b{key}\b", function)) for key in (*WANTED, *SPILLS)}
        kernels.append(
            Kernel(
                arch,
                dtype,
                head_dim,
                head_dim_v,
                rows,
                quantised,
                int(usage["REG"]),
                int(usage["STACK"]),
                counts,
                shared_bytes,
                in_flight,
                threads,
            )
        )
    if len(kernels) != len(facts):
        sys.exit(f"cuda-check: sm_{arch} has {len(kernels)} kernels, the core's table {len(facts)}")
    return sorted(kernels, key=lambda k: (k.dtype, k.quantised, k.head_dim, k.head_dim_v, k.rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_check", description=__doc__)
    parser.add_argument("library", type=Path, help="a core built with CUDA: lean_attention/_C.*.so")
    library = parser.parse_args().library
    if not library.is_file():
        sys.exit(f"cuda-check: there is no {library}")
    facts = kernel_facts(library)
    if not facts:
        sys.exit(f"cuda-check: {library} is built without CUDA; build one with LEAN_ATTENTION_CUDA=1")
    architectures = architectures_of(library)
    if unknown := [arch for arch in architectures if arch not in SHARED_KB]:
        sys.exit(f"cuda-check: what an SM of {', '.join(unknown)} has is not known; add it to SHARED_KB")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda arch: read_kernels(library, facts, arch), architectures)
        kernels = [kernel for result in results for kernel in result]
    table = Table(title="CUDA kernels as compiled (nothing was run)")
    names = (
        "sm",
        "dtype",
        "cache",
        "head_dim",
        "rows",
        "registers",
        "shared KB",
        "CTAs/SM",
        "KB in flight/SM",
    )
    for name in (*names, *WANTED, "stack"):
        table.add_column(name, justify="right")
    problems = []
    for k in kernels:
        dims = str(k.head_dim) if k.head_dim == k.head_dim_v else f"{k.head_dim}/{k.head_dim_v}"
        cache = "8 bits" if k.quantised else "16 bits"
        cells = [
            k.arch,
            k.dtype,
            cache,
            dims,
            k.rows,
            k.registers,
            f"{k.shared_bytes / 1024:.1f}",
            k.ctas_per_sm,
        ]
        cells += [f"{k.ctas_per_sm * k.bytes_in_flight / 1024:.0f}"]
        cells += [k.counts[name] for name in WANTED] + [k.stack]
        table.add_row(*map(str, cells))
        problems += [f"sm_{k.arch} {k.dtype} {cache} {dims} rows {k.rows}: {p}" for p in k.problems()]
    print_whole(table, Console())
    if problems:
        sys.exit("cuda-check:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
