"""What nvcc makes of the CUDA kernels, per architecture: `make cuda-check`. Needs a toolkit, no GPU.

Compiles the kernels for each architecture, prints registers, shared memory, spills and the resident CTAs that
follow, and fails where a kernel spills, lacks the instructions it is built on, or does not fit an SM.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import print_whole
from lean_attention import _build
from lean_attention._core import core

ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")

# Per SM, CUDA C++ programming guide, table of technical specifications: shared memory in KB, of which the
# system takes 1 KB per CTA; resident threads. Registers are 65536 everywhere.
SHARED_KB = {"80": 164, "86": 100, "89": 100, "90a": 228, "100a": 228, "120": 100}
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


def compile_kernels(nvcc: str, arch: str, dtype: str, folder: Path) -> list[Kernel]:
    suffix = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    cubin = folder / f"{suffix}_{arch}.cubin"
    source = _build.ROOT / "csrc" / "cuda" / f"kernels_{suffix}.cu"
    command = [nvcc, *_build.CUDA_FLAGS, f"-I{_build.ROOT / 'csrc'}", "-cubin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"cuda-check: {' '.join(command)}\n{result.stderr}")

    def dump(option: str) -> str:
        disassembler = str(Path(tool("nvdisasm")).parent)
        environment = {"PATH": f"{disassembler}:/usr/bin:/bin"}
        command = [tool("cuobjdump"), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    resources = dict(re.findall(r"Function (\w+):\s*\n\s*(.*)", dump("-res-usage")))
    facts = {row[:5]: row[5:] for row in core.cuda_kernels()}
    kernels = []
    for function in dump("-sass").split("Function : ")[1:]:
        name = function.split(None, 1)[0]
        dims = re.search(r"Li(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", name)
        if dims is None or "decode_kernel" not in name:
            continue
        usage = dict(re.findall(r"(\w+):(\d+)", resources[name]))
        head_dim, head_dim_v, row_tiles, element_bytes = map(int, dims.groups())
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
    if len(kernels) != sum(key[0] == dtype for key in facts):
        sys.exit(f"cuda-check: {cubin.name} has {len(kernels)} kernels, the table of {dtype} others")
    return sorted(kernels, key=lambda k: (k.quantised, k.head_dim, k.head_dim_v, k.rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_check", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    arguments = parser.parse_args()
    toolkit = _build.cuda_toolkit()
    if toolkit is None or not core.cuda_kernels():
        sys.exit("cuda-check: needs a CUDA toolkit and a core built with it (LEAN_ATTENTION_CUDA=1)")
    jobs = [(arch, dtype) for arch in arguments.arch for dtype in ("float16", "bfloat16")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = pool.map(
            lambda job: compile_kernels(str(toolkit / "bin" / "nvcc"), *job, Path(folder)), jobs
        )
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
