"""The text of the kernels' instructions, and their order where memory depends on it. Needs nvcc, no GPU.

The emulated device has a twin of ptx.h and words.h, so that it cannot see what these say.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.sass import Function, Instruction, functions
from lean_attention import _build

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_build.cuda_toolkit() is None, reason="needs a CUDA toolkit"),
]


def compiled(source: str, to: Path, *options: str) -> Path:
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-I{_build.ROOT / 'csrc'}"]
    nvcc = _build.cuda_toolkit() / "bin" / "nvcc"
    subprocess.run([nvcc, *options, *flags, HERE / source, "-o", to], check=True)
    return to


def assembly(ptx: str, kernel: str) -> list[str]:
    """The inline assembly of a kernel, a statement each, whose registers have the names of what is in them.

    `in1` is the kernel's parameter 1, `out1` what is stored in element 1 of its parameter 0, `in1>out1` a
    register that is both; `shared` is its shared memory, `_` anything else.
    """
    body = re.search(rf"\.entry {kernel}\((.*?)\sret;", ptx, flags=re.S)[1]
    marked = r"// begin inline asm\s*(.*?)\s*// end inline asm"
    inline, body = re.findall(marked, body, flags=re.S), re.sub(marked, "", body, flags=re.S)
    names, stored = {}, {}
    for to, parameter in re.findall(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]", body):
        names[to] = f"in{parameter}"
    for to, of in re.findall(r"(?:mov|cvt\w*)\.[\w.]+\s+(%\w+), ([%\w]+);", body):
        names[to] = "shared" if of.endswith("memoryE") else names.get(of, of)
    for to, of, more in re.findall(r"add\.s32\s+(%\w+), (%\w+), (\d+);", body):
        names[to] = f"{names.get(of)}+{more}"
    stores = re.findall(r"st\.global\.[a-z](\d+)\s+\[(%\w+)(?:\+(\d+))?\], (%\w+)", body)
    for bits, address, offset, of in stores:
        assert names[address] == "in0"
        stored[of] = f"out{int(offset or 0) // (int(bits) // 8)}"

    def name(register: re.Match) -> str:
        return ">".join(filter(None, (names.get(register[0]), stored.get(register[0])))) or "_"

    blocks = (re.sub(r"^\{(.*)\}$", r"\1", text, flags=re.S) for text in inline)
    statements = (statement.strip() for block in blocks for statement in block.split(";"))
    return [re.sub(r"%\w+", name, statement) for statement in statements if statement]


SUMS = "{in1>out0, in2>out1, in3>out2, in4>out3}"
PRODUCT = f"{SUMS}, {{in5, in6, in7, in8}}, {{in9, in10}}, {SUMS}"
# Of each kernel of wrappers.cu.
ASSEMBLY = {
    "load_matrices": ["ldmatrix.sync.aligned.m8n8.x4.shared.b16 {out0, out1, out2, out3}, [shared+48]"],
    "load_matrices_transposed": [
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {out0, out1, out2, out3}, [shared+48]"
    ],
    "multiply_add_Half": [f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {PRODUCT}"],
    "multiply_add_BFloat16": [f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {PRODUCT}"],
    # The first source of cvt goes to the upper half.
    "pack_Half": ["cvt.rn.f16x2.f32 out0, in2, in1"],
    "pack_BFloat16": ["cvt.rn.bf16x2.f32 out0, in2, in1"],
    # The source is ignored, and zeros written, where the predicate is true.
    "copy_async": [
        ".reg .pred ignored",
        "setp.eq.u32 ignored, in1, 0",
        "cp.async.cg.shared.global [shared+48], [in0], 16, ignored",
    ],
    "dequantise_e4m3": [
        ".reg .b16 a, b",
        "mov.b32 {a, b}, in1",
        "cvt.rn.f16x2.e4m3x2 out0, a",
        "cvt.rn.f16x2.e4m3x2 out1, b",
    ],
    "exp2_fast": ["ex2.approx.ftz.f32 out0, in1"],
    "load_relaxed": ["ld.relaxed.gpu.global.u64 out0, [in1]"],
    "fence_acquire": ["fence.acq_rel.gpu"],
    "store_relaxed": ["st.relaxed.gpu.global.u64 [in0], in1"],
    "store_release": ["st.release.gpu.global.u64 [in0], in1"],
    "fetch_add_relaxed": ["atom.relaxed.gpu.global.add.u64 out0, [in1], in2"],
    "compare_exchange_relaxed": ["atom.relaxed.gpu.global.cas.b64 _, [in0], in1, in2"],
}


def test_the_text_of_instructions(tmp_path: Path) -> None:
    """PTX ISA: names, and the order of operands."""
    ptx = compiled("wrappers.cu", tmp_path / "wrappers.ptx", "-ptx", "-arch=sm_90").read_text()
    assert {name: assembly(ptx, f"run_{name}") for name in ASSEMBLY} == ASSEMBLY
    assert len(re.findall(r"\.entry run_", ptx)) == len(ASSEMBLY)


def test_e4m3_before_compute_capability_8_9(tmp_path: Path) -> None:
    """Ampere has no instruction for it, and ptxas refuses the text."""
    ptx = compiled("wrappers.cu", tmp_path / "wrappers.ptx", "-ptx", "-arch=sm_80").read_text()
    statements = assembly(ptx, "run_dequantise_e4m3")
    assert [statement.split()[0] for statement in statements] == ["mul.f16x2", "mul.f16x2"]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Function:
    """The machine code of one decode kernel."""
    tools = next(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"), None)
    if tools is None:
        pytest.skip("needs third_party/cuda-check-requirements.txt")
    cubin = compiled(
        "decode_kernel.cu", tmp_path_factory.mktemp("sass") / "kernel.cubin", "-cubin", "-arch=sm_90"
    )
    environment = {"PATH": f"{tools.parent}:/usr/bin:/bin"}
    listing = subprocess.run(
        [tools, "-sass", cubin], capture_output=True, text=True, check=True, env=environment
    ).stdout
    (only,) = functions(listing).values()
    return only


def reached(
    kernel: Function, begin: Instruction, stops: Callable[[Instruction], bool]
) -> dict[int, Instruction]:
    """What may be executed after `begin`, by address; those that stop a path are in it, not what follows."""
    after = {}
    for block in kernel.blocks.values():
        for i, following in zip(block.code, block.code[1:], strict=False):
            after[i.address] = [following]
        after[block.code[-1].address] = [kernel.blocks[at].code[0] for at in block.next]
    found, queue = {}, list(after[begin.address])
    while queue:
        i = queue.pop()
        if i.address in found:
            continue
        found[i.address] = i
        if not stops(i):
            queue += after[i.address]
    return found


def is_barrier(i: Instruction) -> bool:
    return i.family == "BAR"


def is_fence(i: Instruction) -> bool:
    """What acquires: it empties the L1, in which other CTAs' words may be stale."""
    return i.opcode == "CCTL.IVALL"


def test_a_flag_goes_up_after_the_state(kernel: Function) -> None:
    """All threads' stores, a barrier, a fence, the flag: of a partial state, and of the rows of a node."""
    releases = []
    for n, i in enumerate(kernel.code):
        if i.opcode != "STG.E.64.STRONG.GPU":
            continue
        before = [j for j in kernel.code[:n] if j.family not in ("ERRBAR", "CGAERRBAR")]
        if re.fullmatch(r"MEMBAR\.\w+\.GPU", before[-1].opcode):
            releases.append(before)
    assert len(releases) == 2
    for before in releases:
        barrier = max(n for n, j in enumerate(before) if is_barrier(j))
        stored = [j for j in before[barrier:] if j.family == "STG" and "STRONG" not in j.opcode]  # no flags
        assert not stored, "stored between the barrier and the fence"
        state = [n for n, j in enumerate(before) if j.opcode.startswith("STG.E.128")]
        assert state and max(state) < barrier


def test_a_partial_state_is_read_after_its_flag(kernel: Function) -> None:
    """A thread that has seen the flag comes to the block barrier by a fence only."""
    flags = [i for i in kernel.code if i.opcode == "LDG.E.64.STRONG.GPU"]
    polls = [i for i in flags if any(map(is_fence, reached(kernel, i, is_barrier).values()))]
    assert polls, "no load is fenced before a barrier"
    for poll in polls:
        unfenced = reached(kernel, poll, lambda i: is_fence(i) or is_barrier(i)).values()
        assert not any(map(is_barrier, unfenced)), "a way to the barrier has no fence"
        assert not any(re.match(r"LDG\.E\.128|LDG\.E$", i.opcode) for i in unfenced), "read before the fence"


def test_memory_is_read_as_it_is_shared(kernel: Function) -> None:
    """Not by the read-only path, which misses other CTAs' stores; nor as memory of any kind, slowly."""
    texts = [i.text for i in kernel.code]
    assert any("ATOMG." in text for text in texts)
    for wrong in (r"LDG\S*\.CONSTANT", r"LDG\S*\.NC\b", r"\bATOM\.", r"\bQSPC", r"\b(LD|ST)\.\S*STRONG"):
        assert [text for text in texts if re.search(wrong, text)] == []
