"""What nvcc has made of the CUDA kernels: `make cuda-check`. Needs a toolkit to build the core, no GPU.

    python -m benchmarks.cuda_check build/cuda/lean_attention/_C.so

Reads each architecture's machine code out of that core. Prints registers, shared memory, the resident CTAs
that follow, and how many instructions and cycles of a model the paths of each kernel take; then what share of
a GPU's bandwidth the model predicts. Fails where a kernel passes its budget.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import sass
from benchmarks.gpu_model import CASES, GPUS, Paths, Shape, find_paths, share_of_bandwidth
from benchmarks.gpu_model import Path as CodePath
from benchmarks.report import print_whole

# Per SM, CUDA C++ programming guide, table of technical specifications: shared memory in KB, of which the
# system takes 1 KB per CTA; resident threads. Registers are 65536 everywhere.
SHARED_KB = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "103": 228, "110": 228, "120": 100}
REGISTERS = 65536

# SASS: tensor-core product, asynchronous copy to shared memory, matrix load.
WANTED = ("HMMA", "LDGSTS", "LDSM")
# Bytes per thread that may be spilled outside of a step. Rows of 256 dims and more take all registers: they
# spill where partial steps are copied and where a segment begins.
STACK_ALLOWED = 64


@dataclass(frozen=True)
class Budget:
    """What a path may take: at 32 products (head_dim 128, 16 rows) what an H200's bandwidth needs."""

    instructions: float
    cycles: float

    def problems(self, what: str, path: CodePath | None) -> list[str]:
        if path is None:
            return [f"no path for {what} in its SASS"]
        found = []
        if path.instructions > self.instructions or path.cycles > self.cycles:
            found.append(
                f"{what} takes {path.instructions} instructions and {path.cycles} cycles, "
                f"its budget is {self.instructions:.0f} and {self.cycles:.0f}"
            )
        return found


def step_budget(shape: Shape) -> Budget:
    """Of 16 tokens: 400 instructions at 32 products, 650 where 8-bit rows are converted."""
    if shape.quantised:
        return Budget(90 + 17.5 * shape.products, 400 + 50 * shape.products)
    return Budget(80 + 10 * shape.products, 350 + 31.25 * shape.products)


def begin_and_change_budgets(arch: str, shape: Shape) -> tuple[Budget, Budget]:
    """Of the way to the first copy, and of a change of segment, which has the larger states to write too."""
    if arch == "90" and not shape.quantised and shape.head_dim <= 128 and shape.rows == 16:
        return Budget(500, 2600), Budget(1000, 2600)
    larger = max(1, shape.rows * shape.head_dim_v / (16 * 128))
    return Budget(550, 2900), Budget(1000 * larger, 3000 * larger)


def code_budget(shape: Shape) -> int:
    """Bytes of code, functions out of line left out. Kernels of 8-bit caches have a loop for each format."""
    if shape.head_dim <= 128 and shape.rows == 16:
        return 1024 * 100
    return 1024 * (160 if shape.quantised else 112)


@dataclass(frozen=True)
class Kernel:
    arch: str
    dtype: str
    shape: Shape
    registers: int
    stack: int
    counts: dict[str, int]
    shared_bytes: int
    bytes_in_flight: int
    threads: int
    code_bytes: int
    body_bytes: int  # without functions out of line
    paths: Paths

    @property
    def ctas_per_sm(self) -> int:
        per_thread = -(-self.registers // 8) * 8
        by_registers = REGISTERS // (per_thread * self.threads)
        return min(by_registers, SHARED_KB[self.arch] * 1024 // (self.shared_bytes + 1024))

    @property
    def name(self) -> str:
        s = self.shape
        dims = str(s.head_dim) if s.head_dim == s.head_dim_v else f"{s.head_dim}/{s.head_dim_v}"
        return f"{self.dtype}, {'8' if s.quantised else '16'} bits, {dims} x {s.rows}"

    def problems(self) -> list[str]:
        found = [f"no {name} in its SASS" for name in WANTED if not self.counts[name]]
        found += step_budget(self.shape).problems("a step", self.paths.step)
        if self.paths.step and self.paths.step.spills:
            found.append(f"{self.paths.step.spills} spill instructions in a step")
        begin, change = begin_and_change_budgets(self.arch, self.shape)
        found += begin.problems("the way to the first copy", self.paths.begin)
        found += change.problems("a change of segment", self.paths.change)
        if self.stack > STACK_ALLOWED:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.body_bytes > code_budget(self.shape):
            found.append(f"{self.body_bytes} bytes of code; its budget is {code_budget(self.shape)}")
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
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "print(torch.ops.lean_attn_tools.cuda_kernels())"
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
    for name, function in sass.functions(disassemble(library, *only, "-sass")).items():
        shape = re.search(r"(__half|__nv_bfloat16)Li(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", name)
        if shape is None or "decode_kernel" not in name:
            continue
        usage = dict(re.findall(r"(\w+):(\d+)", resources[name]))
        dtype = {"__half": "float16", "__nv_bfloat16": "bfloat16"}[shape[1]]
        head_dim, head_dim_v, row_tiles, element_bytes = map(int, shape.groups()[1:])
        of = Shape(head_dim, head_dim_v, 16 * row_tiles, element_bytes == 1)
        threads, shared_bytes, in_flight = facts[(dtype, head_dim, head_dim_v, of.rows, of.quantised)]
        operations = Counter(i.family for i in function.code)
        kernels.append(
            Kernel(
                arch,
                dtype,
                of,
                int(usage["REG"]),
                int(usage["STACK"]),
                {key: operations[key] for key in WANTED},
                shared_bytes,
                in_flight,
                threads,
                function.bytes,
                function.body_bytes,
                find_paths(function, of),
            )
        )
    if len(kernels) != len(facts):
        sys.exit(f"cuda-check: sm_{arch} has {len(kernels)} kernels, the core's table {len(facts)}")
    order = ("quantised", "head_dim", "head_dim_v", "rows")
    return sorted(kernels, key=lambda k: (k.dtype, *(getattr(k.shape, name) for name in order)))


def kernel_table(kernels: list[Kernel]) -> Table:
    table = Table(title="CUDA kernels as compiled: instructions / cycles of a model (nothing was run)")
    table.add_column("sm")
    table.add_column("kernel")
    names = ("registers", "stack", "shared KB", "CTAs/SM", "KB in flight/SM", "code KB", "of all")
    for name in (*names, "a step", "begin", "change"):
        table.add_column(name, justify="right")

    def text(path: CodePath | None) -> str:
        return "-" if path is None else f"{path.instructions} / {path.cycles}"

    for k in kernels:
        cells = (
            k.registers,
            k.stack,
            f"{k.shared_bytes / 1024:.1f}",
            k.ctas_per_sm,
            f"{k.ctas_per_sm * k.bytes_in_flight / 1024:.0f}",
            f"{k.body_bytes / 1024:.0f}",
            f"{k.code_bytes / 1024:.0f}",
        )
        paths = (text(k.paths.step), text(k.paths.begin), text(k.paths.change))
        table.add_row(k.arch, k.name, *map(str, cells), *paths)
    return table


def model_text(kernels: list[Kernel]) -> str:
    """The predicted shares of the GPUs that machine code was made for, as a table in text."""

    def kernel_of(gpu, quantised: bool) -> Kernel | None:
        wanted = Shape(128, 128, 16, quantised)
        return next(
            (k for k in kernels if k.arch == gpu.arch and k.dtype == "bfloat16" and k.shape == wanted), None
        )

    gpus = [gpu for gpu in GPUS if kernel_of(gpu, False)]
    lines = [
        "Share of the memory's bandwidth, predicted by a model of the machine code; nothing was run.",
        "bf16, 32 query heads, 8 KV heads, head_dim 128; also in pages. At best, in TB/s: "
        + ", ".join(f"{gpu.name} {gpu.read_tb:g}" for gpu in gpus),
        "",
        f"{'case':24}" + "".join(f"{gpu.name:>10}" for gpu in gpus),
    ]
    for case in CASES:
        shares = []
        for gpu in gpus:
            kernel = kernel_of(gpu, case.quantised)
            shares.append(share_of_bandwidth(case, gpu, kernel.paths, kernel.ctas_per_sm))
        lines.append(f"{case.name:24}" + "".join(f"{share:10.2f}" for share in shares))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_check", description=__doc__)
    parser.add_argument("library", type=Path, help="a core built with CUDA: lean_attention/_C.so")
    parser.add_argument("--output", type=Path, help="where to write the model's table")
    options = parser.parse_args()
    library = options.library
    if not library.is_file():
        sys.exit(f"cuda-check: there is no {library}")
    facts = kernel_facts(library)
    if not facts:
        sys.exit(f"cuda-check: {library} is built without CUDA; build one with LEAN_ATTENTION_CUDA=1")
    architectures = architectures_of(library)
    if unknown := [arch for arch in architectures if arch not in SHARED_KB]:
        sys.exit(f"cuda-check: what an SM of {', '.join(unknown)} has is not known; add it to SHARED_KB")
    with ProcessPoolExecutor() as pool:
        results = pool.map(partial(read_kernels, library, facts), architectures)
        kernels = [kernel for result in results for kernel in result]
    print_whole(kernel_table(kernels), Console())
    if all(k.paths.step and k.paths.begin and k.paths.change for k in kernels):
        text = model_text(kernels)
        print(text)
        if options.output:
            options.output.write_text(text)
    problems = [f"sm_{k.arch} {k.name}: {problem}" for k in kernels for problem in k.problems()]
    if problems:
        sys.exit("cuda-check:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
