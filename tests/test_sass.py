"""Paths through machine code, and the model of a GPU that is made of them."""

from __future__ import annotations

import pytest

from benchmarks.gpu_model import CASES, GPUS, Case, Path, Paths, Shape, share_of_bandwidth
from benchmarks.sass import Function, functions


def control(stall: int = 1, writes: int = 7, reads: int = 7, waits: int = 0) -> int:
    return stall << 41 | writes << 46 | reads << 49 | waits << 52


def listing(*instructions: str | tuple[str, int]) -> str:
    """As cuobjdump prints it; a control word may come with an instruction."""
    lines = ["\t\tFunction : kernel", "\t.headerflags"]
    for n, instruction in enumerate(instructions):
        text, word = instruction if isinstance(instruction, tuple) else (instruction, control())
        lines.append(f"        /*{16 * n:04x}*/                   {text} ;    /* 0x{0:016x} */")
        lines.append(f"                                                 /* 0x{word:016x} */")
    return "\n".join(lines) + "\n"


def function(*instructions: str | tuple[str, int]) -> Function:
    return functions(listing(*instructions))["kernel"]


# A loop with a slow and a fast way to copy.
LOOP = (
    "S2R R0, SR_TID.X",  # 00
    "HMMA.16816.F32.BF16 R4, R8, R10, R4",  # 10
    "@P0 BRA 0x50",  # 20
    "LDGSTS.E.BYPASS.128 [R1], desc[UR6][R2.64], !P0",  # 30
    "BRA 0x80",  # 40
    "LDG.E R3, desc[UR6][R2.64]",  # 50
    "LDG.E R5, desc[UR6][R2.64]",  # 60
    "CALL.REL.NOINC 0xb0",  # 70
    "@!PT LDGSTS.E.BYPASS.128 [R1], desc[UR6][R2.64]",  # 80
    "@P1 BRA 0x10",  # 90
    "EXIT",  # a0
    "MOV R7, R8",  # b0
    "RET.REL.NODEC R6 0x0",  # c0
)
COUNTED = {"products": "HMMA", "copies": r"LDGSTS\S*\.128", "loads": r"LDG\."}


@pytest.mark.parametrize(
    ("amounts", "length"),
    [
        ({"products": 1, "copies": 1, "loads": 0}, 6),
        ({"products": 1, "copies": 0, "loads": 2}, 9),  # the slow way, with the function that it calls
        ({"products": 2, "copies": 1, "loads": -1}, 15),  # twice around
        ({"products": 1, "copies": 1, "loads": 2}, None),
        ({"products": 1, "copies": 0, "loads": 0}, None),
    ],
)
def test_the_shortest_path_executes_what_is_wanted(amounts: dict[str, int], length: int | None) -> None:
    code = function(*LOOP)
    path = code.shortest([0x10], lambda to: to == 0x10, COUNTED, amounts)
    assert (path and code.length(path)) == length


def test_a_path_that_ends_elsewhere() -> None:
    code = function(*LOOP)
    assert code.shortest([0], lambda to: to == 0xA0, {}, {}) == [0x00, 0x10, 0x30, 0x80]
    assert code.bytes == 16 * len(LOOP)
    assert code.body_bytes == code.bytes - 2 * 16  # the function that it calls


def test_words_are_counted_by_the_width_of_what_moves_them() -> None:
    code = function("STS.128 [R1], R4", "STS.64 [R1], R4", "@!PT STS [R1], R2", "STS.U8 [R1], R2", "EXIT")
    assert code.counts(code.blocks[0], {"stores": "STS", "stored_words": "STS"}) == (3, 7)


def test_cycles_are_stalls_waits_and_branches() -> None:
    code = function(
        ("LDS R0, [R1]", control(stall=2, writes=0)),
        ("IADD3 R2, R3, R4, RZ", control(stall=5)),
        ("FADD R5, R0, R2", control(stall=4, waits=1)),  # of the load
        ("BRA 0x50", control(stall=5)),
        ("EXIT", control()),
        ("EXIT", control(stall=5)),
    )
    assert code.cycles([0x00, 0x50], {"LDS": 30}) == 30 + 4 + 5 + 8 + 5
    assert code.cycles([0x00, 0x50], {"LDS": 3}) == 2 + 5 + 4 + 5 + 8 + 5


def test_what_a_step_of_a_shape_executes() -> None:
    assert (Shape(128, 128, 16, False).products, Shape(128, 128, 16, False).copies) == (32, 16)
    assert (Shape(128, 128, 32, False).products, Shape(128, 128, 16, True).copies) == (64, 8)
    assert (Shape(512, 512, 16, False).warp_dim_v, Shape(512, 512, 16, True).warp_dim_v) == (256, 128)


def test_the_model() -> None:
    paths = Paths(Path(200, 800, 0), Path(300, 1400, 0), Path(400, 1600, 0))
    slower = Paths(Path(200, 8000, 0), paths.begin, paths.change)
    for gpu in GPUS:
        shares = {case.name: share_of_bandwidth(case, gpu, paths, 2) for case in CASES}
        assert all(0 < share < 1 for share in shares.values())
        assert shares["1 x 1k"] < shares["1 x 8k"] < shares["1 x 128k"]
    long = Case("long", (2**20,))
    fast, slow = (share_of_bandwidth(long, GPUS[2], p, 2) for p in (paths, slower))
    # 8 KB in 8,000 cycles of 8 warps on each of 132 SMs at 1.75 GHz.
    assert fast > 0.95
    assert slow == pytest.approx(8192 / 8000 * 8 * 132 * 1.75e9 / 4.3e12, rel=0.03)
