"""Results into given tensors, as serving engines ask for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lean_attention
from tests.backends import Backend, devices
from tests.cases import BF16, F32, SHORT, Case, make_inputs
from tests.errors import assert_each_raises

CASE = Case(BF16, lens=(300, 0, 17), heads=6, kv_heads=2, head_dim=64, q_len=2)


@pytest.mark.parametrize("q_len", [3, "packed"])
def test_out_and_lse_are_written_and_returned(q_len: int | str) -> None:
    arguments = make_inputs(Case(q_len=q_len, heads=8, lens=(300, 0, 17)))
    want, want_lse = lean_attention.decode(**arguments)
    pool = torch.full((*want.shape[:-1], 2, want.shape[-1] + 8), torch.nan, dtype=want.dtype)
    out = pool[..., 1, :-8]  # a view with gaps
    lse = torch.full((2, *want_lse.shape), torch.nan)[1]
    got = lean_attention.decode(**arguments, out=out, lse=lse)
    assert got[0] is out and got[1] is lse
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert pool[..., 0, :].isnan().all() and pool[..., 1, -8:].isnan().all(), "written between the rows"


# Of an out of shape (3, 2, 6, 64): where it begins, and the strides of its batch, tokens and heads.
PLACES = {
    "even": (2, 2 * 12 * 66, 12 * 66, 66),
    "offset": (1, 2 * 12 * 66, 12 * 66, 66),
    "batch": (2, 2 * 12 * 66 + 1, 12 * 66, 66),
    "token": (2, 2 * 12 * 66, 6 * 66 + 1, 66),
    "head": (2, 2 * 12 * 66, 12 * 66, 65),
    "all": (1, 2 * 12 * 65 + 1, 6 * 65 + 1, 65),
}


@devices
@pytest.mark.parametrize("dtype", [BF16, F32], ids=SHORT.get)
@pytest.mark.parametrize("place", PLACES)
def test_out_at_odd_places(place: str, dtype: torch.dtype, backend: Backend) -> None:
    """Pairs of its elements lie across words of memory, fours of float32 across vectors."""
    arguments = make_inputs(CASE)
    want, want_lse = backend.decode(**arguments, num_ctas=5, out_dtype=dtype)
    offset, *strides = PLACES[place]
    view = {"size": want.shape, "stride": (*strides, 1), "storage_offset": offset}
    pool = torch.full((6000,), torch.nan, dtype=dtype)
    out, lse = backend.decode(
        **arguments, num_ctas=5, out=pool.as_strided(**view), lse=torch.full_like(want_lse, torch.nan)
    )
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    if backend.name != "cuda":  # which takes copies
        pool.as_strided(**view).fill_(torch.nan)
        assert pool.isnan().all(), "written between the rows"


@devices
@pytest.mark.parametrize("dtype", [BF16, F32], ids=SHORT.get)
def test_packed_out_at_odd_places(dtype: torch.dtype, backend: Backend) -> None:
    """And its rows of no sequence, which are written element by element."""
    arguments = make_inputs(Case(BF16, lens=(300, 17, 40), q_len="packed", heads=6, head_dim=64))
    end = int(arguments["cu_seqlens_q"][-1])
    want, want_lse = backend.decode(**arguments, num_ctas=5, out_dtype=dtype)
    pool = torch.full((len(want), 7, 65), torch.nan, dtype=dtype)
    lse = torch.full_like(want_lse, torch.nan)
    out, lse = backend.decode(**arguments, num_ctas=5, out=pool[:, 1:, 1:], lse=lse)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert end < len(out) and (out[end:] == 0).all() and (lse[:, end:] == -torch.inf).all()
    if backend.name != "cuda":
        assert pool[:, 0].isnan().all() and pool[..., 0].isnan().all(), "written between the rows"


def test_nothing_else_is_allocated() -> None:
    inputs = make_inputs(CASE)
    out, lse = lean_attention.decode(**inputs)
    with torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        lean_attention.decode(**inputs, out=out, lse=lse)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) == 0


def test_opcheck() -> None:
    inputs = {name: t.nan_to_num() for name, t in make_inputs(CASE).items()}
    out, lse = (torch.empty_like(t) for t in lean_attention.decode(**inputs))
    op = torch.ops.lean_attn.decode_out.default
    torch.library.opcheck(
        op, (inputs["q"], inputs["k_cache"], inputs["v_cache"], out, lse, inputs["seq_lens"])
    )


def test_compiles() -> None:
    inputs = make_inputs(CASE)
    want = lean_attention.decode(**inputs)

    def step(out, lse, **arguments):
        lean_attention.decode(**arguments, out=out, lse=lse)
        return out * 2

    out, lse = torch.empty_like(want[0]), torch.empty_like(want[1])
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(out, lse, **inputs), want[0] * 2)
    torch.testing.assert_close((out, lse), want)


def test_out_alone() -> None:
    for inputs in (make_inputs(CASE), make_inputs(replace(CASE, q_len="packed"))):
        want, want_lse = lean_attention.decode(**inputs)
        out = torch.empty_like(want)
        got, lse = lean_attention.decode(**inputs, out=out)
        assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)


def test_errors() -> None:
    cases = [
        ({"out": None}, "out is missing; lse is given with it, or not at all"),
        (
            {"out": torch.full((3, 2, 6, 64), 7.0).half()},
            "out is torch.float16; it must be torch.bfloat16, like q, or torch.float32",
        ),
        (
            {"out_dtype": torch.float16, "out": None, "lse": None},
            "out_dtype is torch.float16; it must be torch.bfloat16, like q, or torch.float32",
        ),
        ({"out": torch.empty(3, 2, 6, 72).bfloat16()}, r"out has shape .* dimension 3 must be 64"),
        ({"out": torch.empty(2, 6, 64).bfloat16()}, r"out has shape .* it must have 4 dimensions"),
        ({"lse": torch.empty(3, 2, 6)}, r"lse has shape .* dimension 1 must be 6, the num_heads"),
        ({"lse": torch.empty(3, 6, 2).double()}, "lse is torch.float64; it must be torch.float32"),
        (
            {"out": torch.empty(3, 2, 1, 64).bfloat16().expand(3, 2, 6, 64)},
            "out has .* elements share memory",
        ),
        ({"lse": torch.empty(6, 2).expand(3, 6, 2)}, "lse has .* elements share memory"),
        ({"out": torch.empty(3, 2, 6, 128).bfloat16()[..., ::2]}, "out has stride 2 in its last dimension"),
    ]
    inputs = make_inputs(CASE)
    given = {"out": torch.empty(3, 2, 6, 64).bfloat16(), "lse": torch.empty(3, 6, 2)}

    def decode(changes: dict) -> None:
        lean_attention.decode(**inputs, **{**given, **changes})

    assert_each_raises(ValueError, "decode", decode, cases)
    assert (cases[1][0]["out"] == 7).all()
    with pytest.raises(ValueError, match=r"out_dtype is torch.bfloat16; it must be torch.float32, like q$"):
        lean_attention.decode(**make_inputs(replace(CASE, dtype=F32)), out_dtype=BF16)
    with pytest.raises(TypeError, match=r"out_dtype is 'float32', a str; it must be a torch.dtype or None"):
        lean_attention.decode(**inputs, out_dtype="float32")
