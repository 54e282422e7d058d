"""The ops under torch.autocast: what they are given is cast, what they write is not."""

from __future__ import annotations

import itertools

import pytest
import torch

import lean_attention
from lean_attention import reference
from tests.cases import BF16, F16, F32, SHORT, Case, make_inputs


def inputs_of(q: torch.dtype, cache: torch.dtype, q_len: int = 1) -> dict:
    inputs = make_inputs(Case(F32, lens=(70, 9), heads=4, kv_heads=2, head_dim=64, q_len=q_len))
    inputs["q"] = inputs["q"].to(q)
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].nan_to_num().to(cache)
    return inputs


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: t.to(dtype) if name in ("q", "k_cache", "v_cache") else t for name, t in inputs.items()}


@pytest.mark.parametrize(("q", "cache"), [(F32, F32), (BF16, F32), (F32, BF16), (F16, BF16)], ids=SHORT.get)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_decode(q: torch.dtype, cache: torch.dtype, grad: bool) -> None:
    for dtype, options in itertools.product((BF16, F16), ({}, {"sinks": torch.randn(4), "window_left": 20})):
        print(f"{dtype}, {list(options)}")
        check_decode(dtype, q, cache, grad, options)


def check_decode(dtype: torch.dtype, q: torch.dtype, cache: torch.dtype, grad: bool, options: dict) -> None:
    inputs = {**inputs_of(q, cache), **options}
    want = lean_attention.decode(**cast(inputs, dtype))
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
        for decode in (lean_attention.decode, torch.ops.lean_attn.decode):
            for got, wanted in zip(decode(**inputs), want, strict=True):
                assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_given_outputs_decide() -> None:
    inputs = inputs_of(BF16, F32)
    want, want_lse = lean_attention.decode(**cast(inputs, F32))
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    with torch.autocast("cpu", BF16):
        lean_attention.decode(**inputs, out=out, lse=lse)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_a_float32_out_of_16_bit_queries() -> None:
    inputs = inputs_of(BF16, BF16)
    want, want_lse = lean_attention.decode(**inputs, out_dtype=F32)
    out = torch.empty_like(want)
    with torch.autocast("cpu", BF16):
        _, lse = lean_attention.decode(**inputs, out=out)
        fresh, _ = lean_attention.decode(**inputs_of(F32, F32), out_dtype=F32)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert fresh.dtype == F32


@pytest.mark.parametrize("quantised", [torch.int8, torch.float8_e4m3fn], ids=SHORT.get)
def test_quantised_caches_stay(quantised: torch.dtype) -> None:
    inputs = inputs_of(F32, F32)
    inputs["k_scale"], inputs["v_scale"] = torch.rand(2), torch.rand(2, 2)
    for name in ("k_cache", "v_cache"):
        inputs[name] = (inputs[name] * 20).to(quantised)
    want = lean_attention.decode(**{**inputs, "q": inputs["q"].bfloat16()})
    with torch.autocast("cpu", BF16):
        got = lean_attention.decode(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_no_number_to_compute_in_is_refused_as_ever() -> None:
    with (
        torch.autocast("cpu", BF16),
        pytest.raises(ValueError, match=r"decode: q is torch.float64; it must be torch.float32"),
    ):
        lean_attention.decode(**inputs_of(torch.float64, F32))


@pytest.mark.parametrize(
    ("new", "cache", "tables"),
    [
        (F32, F32, F32),
        (F32, BF16, BF16),
        (BF16, F32, BF16),
        (BF16, BF16, F32),
        (F16, F32, F32),
        (F16, BF16, BF16),
    ],
    ids=SHORT.get,
)
def test_append_kv_follows_the_caches(new: torch.dtype, cache: torch.dtype, tables: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros(2, 2, 50, 2, 64, dtype=cache)
    want = [k_cache.clone(), v_cache.clone()]
    k, v = torch.randn(2, 2, 3, 2, 64, dtype=new)
    q = torch.randn(2, 3, 4, 64).to(new)
    angles = torch.rand(50, 32) * 6
    rotary = {"rotary_cos": angles.cos().to(tables), "rotary_sin": angles.sin().to(tables)}
    lens = torch.tensor([7, 0], dtype=torch.int32)
    reference.append_kv(*want, k, v, lens, **rotary)
    rotated = q.clone()
    with torch.autocast("cpu", BF16):
        lean_attention.append_kv(k_cache, v_cache, k, v, lens, q=rotated, **rotary)
    tolerance = 2e-2 if BF16 in (new, cache) else 2e-3 if new == F16 else 1e-5
    for got, wanted in zip((k_cache, v_cache), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    for b in range(2):
        for i in range(3):
            at = int(lens[b]) + i
            row = reference.rotate(q[b, i], rotary["rotary_cos"][at], rotary["rotary_sin"][at], False)
            torch.testing.assert_close(rotated[b, i].double(), row, rtol=tolerance, atol=tolerance)


def test_append_kv_of_quantised_tokens() -> None:
    caches, new = torch.zeros(2, 2, 50, 2, 64, dtype=torch.int8), torch.ones(2, 2, 1, 2, 64, dtype=torch.int8)
    with torch.autocast("cpu", BF16):
        lean_attention.append_kv(*caches, *new, torch.tensor([4, 0], dtype=torch.int32))
    assert caches.sum() == 2 * 2 * 2 * 64


@pytest.mark.parametrize("new", [F32, BF16], ids=SHORT.get)
def test_append_kv_quantises_what_it_is_given(new: torch.dtype) -> None:
    caches, scales = torch.zeros(2, 2, 50, 2, 64, dtype=torch.int8), torch.zeros(2, 2, 50, 2)
    k, v, q = torch.randn(2, 3, 2, 64).to(new), torch.randn(2, 3, 2, 64), torch.randn(2, 3, 2, 64).bfloat16()
    angles = torch.rand(50, 32) * 6
    rotary = {"rotary_cos": angles.cos().half(), "rotary_sin": angles.sin().half()}
    lens = torch.tensor([7, 0], dtype=torch.int32)
    want = (caches.clone(), scales.clone())
    reference.append_kv(*want[0], k, v.to(new), lens, **rotary, k_scale=want[1][0], v_scale=want[1][1])
    before = q.clone()
    with torch.autocast("cpu", F16):
        lean_attention.append_kv(*caches, k, v, lens, q=q, **rotary, k_scale=scales[0], v_scale=scales[1])
    assert torch.equal(caches, want[0]) and torch.equal(scales, want[1])
    assert q.dtype == BF16 and not torch.equal(q, before)


class Attention(torch.nn.Module):
    """A float32 model's layer, with float32 caches."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 64)

    def forward(self, x, k_cache, v_cache, seq_lens):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 64)).unbind(-3)
        lean_attention.append_kv(k_cache, v_cache, k, v, seq_lens)
        return lean_attention.decode(q, k_cache, v_cache, seq_lens + 1)[0]


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("cache", [F32, BF16], ids=SHORT.get)
def test_compiles(inside: bool, cache: torch.dtype) -> None:
    layer = Attention()

    def step(*arguments):
        if not inside:
            return layer(*arguments)
        with torch.autocast("cpu", BF16):
            return layer(*arguments)

    x, caches = torch.randn(2, 1, 64), torch.randn(2, 2, 50, 1, 64, dtype=cache)
    lens = torch.tensor([7, 30], dtype=torch.int32)
    others = caches.clone()
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=not inside):
        want = step(x, *caches, lens)
        got = torch.compile(step, fullgraph=True)(x, *others, lens)
    assert got.dtype == want.dtype == BF16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(others, caches, rtol=2e-2, atol=2e-2)


class AutocastAttention(Attention):
    def forward(self, *arguments):
        with torch.autocast("cpu", BF16):
            return super().forward(*arguments)


def test_exports() -> None:
    x, caches = torch.randn(2, 1, 64), torch.randn(2, 2, 50, 1, 64)
    lens = torch.tensor([7, 30], dtype=torch.int32)
    layer = AutocastAttention()
    with torch.no_grad():
        exported = torch.export.export(layer, (x, *caches.clone(), lens))
        want = layer(x, *caches.clone(), lens)
        for program in (exported, exported.run_decompositions({})):
            torch.testing.assert_close(program.module()(x, *caches.clone(), lens), want)


@pytest.mark.parametrize("op", ["decode", "decode_out", "append_kv"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_rules_are_registered(op: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lean_attn::{op}", key)


@pytest.mark.gpu
def test_decode_on_a_gpu() -> None:
    inputs = {name: t.cuda() for name, t in inputs_of(F32, F32).items()}
    want = lean_attention.decode(**cast(inputs, F16))
    with torch.autocast("cuda", F16):
        got = lean_attention.decode(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
