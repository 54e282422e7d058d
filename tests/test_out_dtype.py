"""Outputs in float32 of 16-bit queries: what they are before they are rounded."""

from __future__ import annotations

import pytest
import torch

import lean_attention
from lean_attention import reference
from tests.backends import BACKENDS, INSTRUCTION_SETS, Backend, devices, listed, on_each
from tests.cases import BF16, E4M3, E5M2, F16, F32, INT8, SHORT, Case, make_inputs

CASES = [
    Case(BF16, lens=(300, 70)),
    Case(F16, lens=(300, 70), heads=8, kv_heads=1, head_dim=80, head_dim_v=96),
    Case(BF16, lens=(300, 5), q_len=17, head_dim=40, head_dim_v=24, num_ctas=5),
    Case(F16, lens=(130, 60), heads=16, q_len=9, sinks=True, layout="paged"),
    Case(BF16, lens=(130, 60), heads=6, q_len="packed", layout="paged_heads_first", block_size=48),
    Case(BF16, lens=(130, 60), quantised=INT8, scales="head"),
    Case(F16, lens=(130, 60), quantised=INT8, scales="scalar", q_len=9, heads=16, head_dim=72),
    Case(BF16, lens=(130, 60), quantised=E4M3, heads=6, head_dim=56),
    Case(F16, lens=(130, 60), quantised=E5M2, scales="head", layout="paged", head_dim=64, q_len=3),
    Case(BF16, lens=(130, 60), quantised=E4M3, q_len=9, heads=16, kv_heads=1, layout="heads_first"),
]
MORE = [
    Case(BF16, lens=(130, 60), quantised=INT8, scales="row", leftpad=True, head_dim_v=64),
    Case(F16, lens=(200, 60), q_len=3, window_left=40, alibi="heads", softcap=5.0),
    Case(BF16, lens=(200, 60), q_len=5, tree=True, sinks=True, num_ctas=7),
]
FLOATS = {"out_dtype": F32}


@listed(on_each([*CASES, *MORE], BACKENDS))
def test_rounded_it_is_the_output(case: Case, backend: Backend) -> None:
    inputs = make_inputs(case)
    want, want_lse = backend.decode(**inputs)
    out, lse = backend.decode(**inputs, **FLOATS)
    assert out.dtype == F32 and want.dtype == case.dtype
    assert torch.equal(out.to(case.dtype), want) and torch.equal(lse, want_lse)
    several = out[out != 0]  # an output of one token is its V row
    assert (several.to(case.dtype).float() != several).float().mean() > 0.5, "rounded before"


@listed(on_each(CASES, BACKENDS))
def test_it_is_near_the_definition(case: Case, backend: Backend) -> None:
    """Queries of zeros have equal weights, which no kernel rounds: what is left is the sums' own error.

    On a GPU they are multiplied by scales, which are powers of two here.
    """
    inputs = make_inputs(case)
    inputs["q"].zero_()
    if case.scales:
        inputs["v_scale"].fill_(0.25)
    want, _ = reference.decode(**{name: value for name, value in inputs.items() if name != "num_ctas"})
    out, _ = backend.decode(**inputs, **FLOATS)
    rounding = (want.to(case.dtype).double() - want).abs().max()
    error = (out.double() - want).abs().max()
    assert error < rounding / 100, f"{case}: off by {error:.3g}, rounding takes {rounding:.3g}"


# They multiply in float32.
WIDE = [name for name in INSTRUCTION_SETS if name in ("avx512", "avx2", "portable")]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=SHORT.get)
@pytest.mark.parametrize("name", WIDE)
def test_weights_that_are_not_rounded(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAN_ATTENTION_CPU", name)
    inputs = make_inputs(Case(dtype, lens=(300, 70), q_len=3))
    want, _ = reference.decode(**inputs)
    out, _ = lean_attention.decode(**inputs, **FLOATS)
    rounding = (want.to(dtype).double() - want).abs().max()
    assert (out.double() - want).abs().max() < rounding / 100


@devices
def test_prefixes_that_are_shared(backend: Backend) -> None:
    case = Case(BF16, (120, 90, 200, 77), heads=16, q_len=3)
    inputs = make_inputs(case)
    inputs["shared"] = torch.tensor([(0, 4, 0, 40), (2, 4, 40, 70)], dtype=torch.int32)
    want, want_lse = backend.decode(**inputs, num_ctas=5)
    out, lse = backend.decode(**inputs, num_ctas=5, **FLOATS)
    assert torch.equal(out.to(BF16), want) and torch.equal(lse, want_lse)


def test_q_in_float32() -> None:
    inputs = make_inputs(Case(F32))
    want = lean_attention.decode(**inputs)
    assert all(map(torch.equal, lean_attention.decode(**inputs, **FLOATS), want))


def test_the_dtype_of_a_given_out() -> None:
    inputs = make_inputs(Case(BF16))
    want, _ = lean_attention.decode(**inputs, **FLOATS)
    for out_dtype in (None, F32):
        out = torch.full_like(want, torch.nan)
        got, _ = lean_attention.decode(**inputs, out=out, out_dtype=out_dtype)
        assert got is out and torch.equal(out, want)
    with pytest.raises(ValueError, match=r"decode: out_dtype is torch.bfloat16, and out is torch.float32;"):
        lean_attention.decode(**inputs, out=torch.empty_like(want), out_dtype=BF16)


def test_opcheck() -> None:
    inputs = {name: t.nan_to_num() for name, t in make_inputs(Case(BF16, lens=(70, 9))).items()}
    q, *others = inputs.values()
    ops = torch.ops.lean_attn
    torch.library.opcheck(ops.decode.default, (q, *others), FLOATS)
    out, lse = (torch.empty_like(t) for t in lean_attention.decode(**inputs, **FLOATS))
    torch.library.opcheck(ops.decode_out.default, (q, *others[:2], out, lse, *others[2:]))


def test_compiles() -> None:
    def step(**arguments):
        out, lse = lean_attention.decode(**arguments, **FLOATS)
        return out * 2, *lean_attention.merge_states([out, out], [lse, lse], out_dtype=BF16)

    inputs = make_inputs(Case(BF16, lens=(70, 9)))
    want = step(**inputs)
    assert (want[0].dtype, want[1].dtype) == (F32, BF16)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(**inputs), want)
