"""A model of the decode kernel's time on a GPU, from the machine code that nvcc makes. Nothing is run.

A warp's time for a step, for what comes before its first copy, and for a change of segment are those of paths
through the code (`benchmarks.sass`). The rest is arithmetic: how many LeanTiles a CTA gets, and the bandwidth
that memory gives at most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path as File

from benchmarks.sass import Function

# What `make cuda-check` has found; a GPU machine need not have what reads machine code.
RESULTS = File(__file__).resolve().parent / "results" / "cuda_model.txt"

WARPS = 4  # of a CTA; an SM has as many schedulers
STEP_TOKENS = 16
LAUNCH_US = 1.5  # assumed
FIRST_BYTE_US = 0.8  # assumed: from memory
PEER_CYCLES = 80  # assumed: to merge one more partial state


@dataclass(frozen=True)
class Path:
    instructions: int
    cycles: int
    spills: int  # loads and stores of spilled registers among them


@dataclass(frozen=True)
class Paths:
    """Of one kernel. None: its code has no such path."""

    step: Path | None  # of 16 tokens, between two products of the same panel
    begin: Path | None  # before the first copy, where lengths are read
    change: Path | None  # from the last product of a segment to the first one of the next
    idle: Path | None = (
        None  # from the same to the first copy for the next, where it begins before the result
    )


@dataclass(frozen=True)
class Shape:
    head_dim: int
    head_dim_v: int
    rows: int
    quantised: bool

    @property
    def warp_dim_v(self) -> int:
        """Columns of the output that a warp has; see csrc/cuda/decode/config.h."""
        if self.head_dim_v <= 256:
            return self.head_dim_v
        return self.head_dim_v // (4 if self.quantised else 2)

    @property
    def products(self) -> int:
        """Of a step."""
        return self.rows // 16 * 2 * (self.head_dim // 16 + self.warp_dim_v // 16)

    @property
    def copies(self) -> int:
        """Of 16 bytes, of each lane in a step."""
        element_bytes = 1 if self.quantised else 2
        return (self.head_dim + self.warp_dim_v) * STEP_TOKENS * element_bytes // 16 // 32


PRODUCT, COPY = "HMMA", r"LDGSTS\S*\.128"
PATTERNS = {
    "products": PRODUCT,
    "copies": COPY,
    "barriers": "BAR",
    "scans": r"SHFL\.UP",
    "atomics": "ATOM",
    "loads": r"LDG\.",
    "stores": "STG",
    "matrices": "LDSM",
    # Also where the compiler does not know that memory is shared; halves of words are outputs.
    "shared_words": r"STS|ST\.(?!E\.U)",
}

# What the thread that finds a range executes before the scan, which is the length of a sequence, and from
# there on: the walk and the first segment, which it lays in shared memory by stores of one to four words.
# Another one takes the ticket meanwhile.
NEITHER = {"atomics": 0, "stores": 0, "matrices": 0}
BEFORE_SCAN = {"scans": 0, "barriers": 0, "loads": -1, **NEITHER}
FROM_SCAN = {"scans": -5, "barriers": 2, "loads": 0, "shared_words": -46, **NEITHER}


def find_paths(code: Function, shape: Shape) -> Paths:
    """The fast paths of a kernel: those that execute what a step, a start or a change has to, and no more."""
    products = code.blocks_with(PRODUCT)
    copies = set(code.blocks_with(COPY))

    def shortest(begins, goal, most: int = 20000, **amounts) -> list[int] | None:
        return code.shortest(begins, goal, {name: PATTERNS[name] for name in amounts}, amounts, most)

    def path(blocks: list[int] | None) -> Path | None:
        if blocks is None:
            return None
        operations = code.histogram(blocks)
        return Path(code.length(blocks), code.cycles(blocks), operations["LDL"] + operations["STL"])

    def step() -> list[int] | None:
        """From a product back to the same one."""
        found = None
        for at in products:
            most = 20000 if found is None else code.length(found) - 1
            again = shortest(
                [at], lambda to, at=at: to == at, most, products=shape.products, copies=shape.copies
            )
            found = again or found
        return found

    def begin() -> list[int] | None:
        found = []
        for scan in code.blocks_with(PATTERNS["scans"]):
            before = shortest([min(code.blocks)], lambda to, scan=scan: to == scan, **BEFORE_SCAN)
            after = before and shortest([scan], lambda to: to in copies, **FROM_SCAN)
            if after:
                found.append(before + after)
        return min(found, key=code.length, default=None)

    # A partial state is published: its output by words of four, m, l and the flag.
    change = shortest(
        products,
        lambda to: to in products,
        barriers=-4,
        copies=-shape.copies,
        stores=-(3 + shape.rows * shape.head_dim_v // (4 * 32 * WARPS)),
    )
    idle = shortest(products, lambda to: to in copies, barriers=-1, copies=0)
    return Paths(path(step()), path(begin()), path(change), path(idle))


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    sms: int
    ghz: float
    read_tb: float  # per second, at best: measured by others, or nine tenths of the data sheet's


GPUS = (
    Gpu("A100", "80", 108, 1.41, 1.8),
    Gpu("H100", "90", 132, 1.75, 3.0),
    Gpu("H200", "90", 132, 1.75, 4.3),
    Gpu("B200", "100", 148, 1.85, 7.2),
    Gpu("RTX 5090", "120", 170, 2.4, 1.6),
)


@dataclass(frozen=True)
class Case:
    """8 KV heads of 128 and their query heads, 16-bit or quantised caches."""

    name: str
    lens: tuple[int, ...]
    quantised: bool = False


CASES = (
    Case("1 x 1k", (1024,)),
    Case("1 x 8k", (8192,)),
    Case("1 x 128k", (131072,)),
    Case("32 x 4k", (4096,) * 32),
    Case("31 x 1k and 64k", (1024,) * 31 + (65536,)),
    Case("1 x 128k, e4m3", (131072,), quantised=True),
)

KV_HEADS, HEAD_DIM, TILE_TOKENS, MIN_TILES = 8, 128, 128, 2


def share_of_bandwidth(case: Case, gpu: Gpu, paths: Paths, ctas_per_sm: int) -> float:
    """The share of the read bandwidth that a call reaches, by the model."""
    bytes_read = sum(case.lens) * KV_HEADS * HEAD_DIM * 2 * (1 if case.quantised else 2)
    tiles = [-(-length // TILE_TOKENS) for length in case.lens]
    total = KV_HEADS * sum(tiles)
    ctas = max(1, min(gpu.sms * ctas_per_sm, total // MIN_TILES))
    tiles_per_cta = -(-total // ctas)
    steps = tiles_per_cta * TILE_TOKENS // STEP_TOKENS // WARPS  # of a warp
    warps = -(-ctas // gpu.sms)  # on a scheduler
    step_cycles = max(paths.step.cycles, warps * paths.step.instructions)
    cycles = steps * step_cycles
    segments = 1 + tiles_per_cta / (total / (KV_HEADS * len(tiles)))
    peers = max(tiles) / tiles_per_cta
    microseconds = 1e-3 / gpu.ghz
    reading = max(cycles * microseconds, bytes_read / gpu.read_tb / 1e6)
    around = (paths.begin.cycles + segments * paths.change.cycles + peers * PEER_CYCLES) * microseconds
    # What is copied first for a segment is waited for, as far as the last one's result does not take as long.
    hidden = 0 if paths.idle is None else max(0, paths.change.cycles - paths.idle.cycles) * microseconds
    around += (segments - 1) * max(0.0, FIRST_BYTE_US - hidden)
    return bytes_read / gpu.read_tb / 1e6 / (LAUNCH_US + FIRST_BYTE_US + around + reading)


def predicted_share(case: str, gpu: str = "H200") -> float | None:
    """What the model says of a case, as `make cuda-check` last wrote it; None: nothing."""
    if not RESULTS.is_file():
        return None
    rows = [re.split(r"\s{2,}", line.strip()) for line in RESULTS.read_text().splitlines()]
    header = next((row for row in rows if row[0] == "case"), None)
    found = next((row for row in rows if row[0] == case), None)
    return float(found[header.index(gpu)]) if header and found else None
