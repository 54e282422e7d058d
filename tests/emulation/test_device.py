"""The emulated device: matrix fragments against the PTX manual, and that it notices what is broken."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.cases import Case, assert_close, make_inputs
from tests.emulation import load


def bits(matrix: torch.Tensor) -> list[list[int]]:
    return (matrix.view(torch.int16).int() & 0xFFFF).tolist()


def pair(low: int, high: int) -> int:
    return low | high << 16


def test_matrix_product_fragments() -> None:
    """PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": 16-bit A and B, fp32 C."""
    a, b = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    a_bits, b_bits = bits(a), bits(b)
    a_fragments, b_fragments = [], []
    for lane in range(32):
        group, thread = divmod(lane, 4)
        k = 2 * thread
        a_fragments.append(
            [
                pair(a_bits[group][k], a_bits[group][k + 1]),
                pair(a_bits[group + 8][k], a_bits[group + 8][k + 1]),
                pair(a_bits[group][k + 8], a_bits[group][k + 9]),
                pair(a_bits[group + 8][k + 8], a_bits[group + 8][k + 9]),
            ]
        )
        b_fragments.append(
            [
                pair(b_bits[k][group], b_bits[k + 1][group]),
                pair(b_bits[k + 8][group], b_bits[k + 9][group]),
            ]
        )
    c = load().multiply_add(a_fragments, b_fragments)
    want = a.float() @ b.float()
    for lane in range(32):
        group, thread = divmod(lane, 4)
        rows = [group, group, group + 8, group + 8]
        columns = [2 * thread, 2 * thread + 1, 2 * thread, 2 * thread + 1]
        torch.testing.assert_close(torch.tensor(c[lane]), want[rows, columns], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_load_fragments(transposed: bool) -> None:
    """PTX ISA, ldmatrix: lane T receives row T / 4, elements 2 (T % 4) and the next, of each 8 x 8 matrix."""
    rows = torch.randint(0, 2**16, (32, 8))
    got = load().load_matrices(rows.tolist(), transposed)
    for matrix in range(4):
        of = rows[matrix * 8 : matrix * 8 + 8]
        of = of.T if transposed else of
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            assert got[lane][matrix] == pair(int(of[row, column]), int(of[row, column + 1]))


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16])
def test_shuffles(distance: int) -> None:
    """PTX ISA, shfl.sync: .bfly reads lane ^ b; .up reads lane - b, and the own value below lane b."""
    lanes = list(range(32))
    assert load().shuffle_xor(lanes, distance) == [lane ^ distance for lane in lanes]
    assert load().shuffle_up(lanes, distance) == [
        lane - distance if lane >= distance else lane for lane in lanes
    ]


def test_an_old_gpu_is_named() -> None:
    """In a process of its own: what is known of a device is kept."""
    load()  # here, where it may be skipped
    code = (
        "import torch; from tests.emulation import load; load().configure(seed=1, capability=75); "
        "q = torch.zeros(1, 1, 1, 64).half(); torch.ops.lean_attn_emulated.decode(q, q, q)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "compute capability 7.5; the kernels need 8.0 (Ampere) or newer" in result.stderr


# One output over many CTAs, several outputs, peers of peers.
CASE = Case(torch.bfloat16, lens=(2500, 300, 1), heads=4, kv_heads=1, head_dim=64)


def decode_under(fault: str, seed: int, **configuration) -> None:
    emulated = load()
    emulated.configure(seed=seed, fault=getattr(emulated.Fault, fault), **configuration)
    inputs = make_inputs(CASE)
    out, lse = torch.ops.lean_attn_emulated.decode(**inputs, num_ctas=9)
    assert_close(CASE, inputs, out, lse)


UNORDERED = [
    "unordered_release",
    "unordered_acquire",
    "no_barrier_before_release",
    "no_barrier_after_acquire",
]


@pytest.mark.parametrize("fault", UNORDERED)
def test_a_fix_up_without_memory_order_is_caught(fault: str) -> None:
    for seed in range(5):
        with pytest.raises(RuntimeError, match="not ordered after the store by CTA"):
            decode_under(fault, seed)


def test_hosts_that_wait_for_ctas_yet_to_start_are_caught() -> None:
    """With as many slots as CTAs it works; that is why it would pass on an idle GPU."""
    decode_under("reversed_tickets", 1, resident_ctas=9)
    with pytest.raises(RuntimeError, match="the launch hangs"):
        decode_under("reversed_tickets", 1, resident_ctas=1)


def test_stale_flags_are_caught() -> None:
    """A host that leaves flags up would, in a graph's next replay, read partial states of the one before."""
    emulated = load()
    emulated.configure(seed=3, fault=emulated.Fault.flags_stay_up)
    inputs = make_inputs(CASE)
    outputs = torch.ops.lean_attn_emulated.decode(**inputs, num_ctas=9)  # held: replays write there
    with pytest.raises(RuntimeError, match=r"reads what no CTA has stored|is not ordered after"):
        for _ in range(20):
            emulated.replay()
    assert len(outputs) == 2


@pytest.mark.parametrize("fault", ["short_copy_wait", "no_warp_barrier"])
def test_missing_waits_inside_a_cta_are_caught(fault: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(10):
            decode_under(fault, seed)


def test_no_fault_passes() -> None:
    for seed in range(5):
        decode_under("none", seed, resident_ctas=1 + seed)
