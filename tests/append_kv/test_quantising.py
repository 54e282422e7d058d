"""append_kv into caches of fewer bits than the new rows, bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lean_attention
from lean_attention import reference
from tests.append_kv.inputs import check_bits, clones, make_arguments, to_bits, with_quantised_caches
from tests.backends import Backend, devices, only
from tests.cases import BF16, DTYPES, E4M3, E5M2, F32, INT8, QUANTISED, SHORT
from tests.errors import assert_each_raises


@devices
@pytest.mark.parametrize("quantised", QUANTISED, ids=SHORT.get)
def test_rows_of_any_length_and_size(backend: Backend, quantised: torch.dtype) -> None:
    powers = 2.0 ** torch.linspace(-44, 15, 3 * 12 * 2).view(3, 12, 2, 1)
    for dtype, dim in itertools.product(DTYPES, (8, 24, 129, 576)):
        arguments = make_arguments(F32, False, 12, "", dims=(dim, dim))
        for name, sign in (("k", 1), ("v", -1)):
            arguments[name] = (arguments[name].clamp(-1.9, 1.9) * powers**sign).to(dtype)
        arguments = with_quantised_caches(arguments, quantised)
        check_bits(backend, arguments, name=f"{SHORT[dtype]}, {dim} dims:")


@devices
def test_all_halves_are_rounded_to_even(backend: Backend) -> None:
    """Steps and the middles between them, of the whole range of each dtype."""
    for quantised in QUANTISED:
        if quantised == INT8:
            numbers = torch.arange(-127, 128).float()
        else:
            numbers = torch.arange(256, dtype=torch.uint8).view(quantised).float()
            numbers = numbers[numbers.isfinite()].sort().values
        numbers = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
        rows = torch.cat(
            [numbers, numbers.nextafter(torch.tensor(9e9)), numbers.nextafter(-torch.tensor(9e9))]
        )
        rows = rows.clamp(-numbers.max(), numbers.max()).view(3, 1, 1, -1)
        rows[..., 0] = numbers.max()  # a scale of 1
        caches = torch.zeros(2, 3, 4, 1, rows.shape[3], dtype=quantised)
        arguments = {"k_cache": caches[0], "v_cache": caches[1], "k": rows, "v": -rows}
        arguments |= {name: torch.zeros(3, 4, 1) for name in ("k_scale", "v_scale")}
        check_bits(backend, {**arguments, "seq_lens": torch.zeros(3, dtype=torch.int32)})
        assert (arguments["k_scale"][:, 0] == 1).all()
        assert torch.equal(
            to_bits(caches[0, :, 0]),
            to_bits((rows[:, 0].round() if quantised == INT8 else rows[:, 0]).to(quantised)),
        )


TINY = 2.0**-149  # the smallest float


ROWS = {
    "zeros": [0.0, -0.0],
    "nan": [1.0, torch.nan],
    "infinity": [1.0, -torch.inf, 3.0],
    "both": [torch.inf, torch.nan],
    "the scale underflows": [TINY, -3 * TINY],
    "the scale is the smallest float": [100 * TINY, -30 * TINY],
    "quotients above the largest number": [190 * TINY, -189 * TINY],
    "subnormal": [1e-39, -3e-40],
    "fp8 scales are subnormal": [1e-36, 3e-37, 1e-42],
    "huge": [3.4028234e38, -3.4028234e38, 1e30],
    "one large element": [-3e38, 1e-30, 1.0],
}


@devices
def test_rows_at_the_ends_of_float32(backend: Backend) -> None:
    for quantised, row in itertools.product(QUANTISED, ROWS):
        print(f"{SHORT[quantised]}: {row}")
        check_row(backend, quantised, row)


def check_row(backend: Backend, quantised: torch.dtype, row: str) -> None:
    arguments = make_arguments(F32, True, 2, "")
    values = torch.tensor(ROWS[row])
    for name in ("k", "v"):
        new = arguments[name][1]
        new.copy_(values.repeat(new.numel())[: new.numel()].view_as(new))
    arguments = with_quantised_caches(arguments, quantised)
    check_bits(backend, arguments, name=SHORT[quantised])
    blocks, slots = arguments["block_table"][1, 0].long(), torch.arange(2)
    # In float64: the largest float times 127, divided by 127, is beyond it.
    stored = arguments["k_cache"][blocks, slots].double() * arguments["k_scale"][blocks, slots][..., None]
    if values.isfinite().all():
        largest = values.abs().max()
        step = {INT8: 0.5 / 127, E4M3: 1 / 16, E5M2: 1 / 8}[quantised]
        error = (stored - arguments["k"][1]).abs().max()
        has_few_bits = largest < 1e-33  # the scale
        assert error <= largest * (1 if has_few_bits else 1.001 * step), f"{quantised}: {error=} {largest=}"
    else:
        assert stored.isnan().all(), quantised


@devices
def test_attention_to_a_row_that_is_not_finite_is_nan(backend: Backend) -> None:
    for quantised, bad, side in itertools.product(QUANTISED, (torch.nan, torch.inf), "kv"):
        print(f"{bad} in {side} of {quantised} caches")
        check_attention_to(backend, quantised, bad, side)


def check_attention_to(backend: Backend, quantised: torch.dtype, bad: float, side: str) -> None:
    arguments = with_quantised_caches(make_arguments(F32, True, 2, "", dims=(64, 64)), quantised)
    for name in ("k_scale", "v_scale"):
        arguments[name].zero_()
    for name in ("k_cache", "v_cache"):
        to_bits(arguments[name]).zero_()
    arguments[side][1, 1, 0, 5] = bad
    backend.append_kv(**arguments)
    where = {name: arguments[name] for name in ("k_cache", "v_cache", "block_table", "k_scale", "v_scale")}
    q, lens = torch.randn(3, 1, 4, 64), arguments["seq_lens"] + 2
    out, _ = lean_attention.decode(q, seq_lens=lens, **where)
    assert out[1, 0, :2].isnan().all()
    assert out[1, 0, 2:].isfinite().all() and out[[0, 2]].isfinite().all()
    lens[1] -= 1  # before that row
    assert lean_attention.decode(q, seq_lens=lens, **where)[0].isfinite().all()


@devices
@pytest.mark.parametrize("quantised", QUANTISED, ids=SHORT.get)
def test_decode_over_appended_rows(backend: Backend, quantised: torch.dtype) -> None:
    for dtype in DTYPES:
        check_decode_over_appended_rows(backend, dtype, quantised)


def check_decode_over_appended_rows(backend: Backend, dtype: torch.dtype, quantised: torch.dtype) -> None:
    batch, tokens, heads = 2, 50, 2
    lens = torch.zeros(batch, dtype=torch.int32)
    k, v = torch.randn(2, batch, tokens, heads, 64).to(dtype)
    caches = torch.zeros(2, batch, 64, heads, 64, dtype=quantised)
    scales = torch.zeros(2, batch, 64, heads)
    prompt = {"k": k[:, :49], "v": v[:, :49], "seq_lens": lens}
    token = {"k": k[:, 49:], "v": v[:, 49:], "seq_lens": lens + 49}
    for new in (prompt, token):
        backend.append_kv(k_cache=caches[0], v_cache=caches[1], k_scale=scales[0], v_scale=scales[1], **new)
    q = torch.randn(batch, 1, 4, 64).to(dtype)
    got, _ = lean_attention.decode(q, *caches, lens + tokens, k_scale=scales[0], v_scale=scales[1])
    rows = caches.double() * scales.double()[..., None]
    want, _ = reference.decode(q, *rows, lens + tokens)
    assert (got.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps, dtype
    unquantised, _ = reference.decode(q, k, v, lens + tokens)
    error = (got - unquantised).abs().max()
    assert error < {INT8: 0.03, E4M3: 0.12, E5M2: 0.25}[quantised], (dtype, error)


@devices
def test_one_quantised_memory_for_keys_and_values(backend: Backend) -> None:
    arguments = with_quantised_caches(make_arguments(BF16, False, 2, "", dims=(64, 64)), INT8)
    arguments["v_cache"], arguments["v"] = arguments["k_cache"], arguments["k"]
    arguments["v_scale"] = arguments["k_scale"]
    check_bits(backend, arguments)
    arguments["v_cache"], arguments["v"] = arguments["k_cache"][..., :40], arguments["k"][..., :40]
    with pytest.raises(
        ValueError, match="append_kv: v_cache is k_cache's memory, and v has head_dim 40, k 64"
    ):
        backend.append_kv(**arguments)


@devices
def test_one_memory_for_scales_of_two_caches_is_refused(backend: Backend) -> None:
    arguments = with_quantised_caches(make_arguments(F32, False, 1, ""), INT8)
    arguments["v_scale"] = arguments["k_scale"]
    with pytest.raises(
        ValueError, match="append_kv: v_scale is k_scale's memory, and v_cache is not k_cache's"
    ):
        backend.append_kv(**arguments)


@only("emulated", "cuda")  # a CPU refuses them as any others
def test_quantised_tokens_outside_the_cache_are_not_written(backend: Backend) -> None:
    arguments = with_quantised_caches(make_arguments(F32, True, 2, "half"), INT8)
    good = clones(arguments)
    arguments["seq_lens"][1] = 24
    arguments["block_table"][2, 1] = 99
    backend.append_kv(**arguments)
    assert "(the first of " in backend.take_error()
    for name in ("k_cache", "v_cache"):
        changed = (to_bits(arguments[name]) != to_bits(good[name])).flatten(2).any(dim=2).sum()
        assert changed == 3
    for name in ("k_scale", "v_scale"):
        assert (arguments[name] != good[name]).any(dim=2).sum() == 3


BAD_SCALES = [
    (
        {"k_scale": None},
        "k_scale is missing; k_cache is torch.int8 and k is torch.float32, so rows are quantised",
    ),
    ({"v_scale": None}, "v_scale is missing; v_cache is torch.int8 and k is torch.float32"),
    ({"k_scale": torch.zeros(4, 25, 2).double()}, "k_scale is torch.float64; it must be torch.float32"),
    ({"k_scale": torch.zeros(4, 25)}, r"k_scale has shape \[4, 25\]; it must have 3 dimensions"),
    ({"v_scale": torch.zeros(4, 25, 1)}, r"v_scale has shape \[4, 25, 1\]; its dimension 2 must be 2"),
    ({"k_scale": torch.zeros(4, 1, 2)}, r"k_scale has shape \[4, 1, 2\]; its dimension 1 must be 25"),
    ({"v_scale": torch.zeros(2).expand(4, 25, 2)}, "v_scale has shape .* by which elements share memory"),
    ({"v_cache": torch.zeros(4, 25, 2, 40)}, "v_cache is torch.float32; it must be torch.int8, like k_cache"),
    (
        {"v_cache": torch.zeros(4, 25, 2, 40).to(E5M2)},
        "v_cache is torch.float8_e5m2; it must be torch.int8",
    ),
    (
        {"k": torch.randn(3, 1, 2, 64).double()},
        "k is torch.float64; it must be torch.float32, torch.float16 or torch.bfloat16",
    ),
    ({"v": torch.zeros(3, 1, 2, 40, dtype=INT8)}, "v is torch.int8; it must be torch.float32, like k"),
    (
        {"k": torch.zeros(3, 1, 2, 64).char(), "v": torch.zeros(3, 1, 2, 40).char()},
        "k_scale is given, and k is torch.int8, as is k_cache; scales are written where a quantised cache",
    ),
    (
        {"k_cache": torch.zeros(4, 25, 2, 64), "v_cache": torch.zeros(4, 25, 2, 40)},
        "k_scale is given, and k is torch.float32, as is k_cache; scales are written where",
    ),
]


def test_errors_of_quantised_caches() -> None:
    arguments = with_quantised_caches(make_arguments(F32, False, 1, ""), INT8)
    before = clones(arguments)

    def append(changes: dict) -> None:
        lean_attention.append_kv(**{**arguments, **changes})

    assert_each_raises(ValueError, "append_kv", append, BAD_SCALES)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert torch.equal(arguments[name], before[name]), "something was written"


@pytest.mark.gpu
def test_scales_on_another_device() -> None:
    arguments = with_quantised_caches(make_arguments(F32, False, 1, ""), INT8)
    moved = {name: t.cuda() if isinstance(t, Tensor) else t for name, t in arguments.items()}
    with pytest.raises(
        ValueError, match="append_kv: v_scale is on cpu, k on cuda:0; they must be on the same"
    ):
        lean_attention.append_kv(**{**moved, "v_scale": arguments["v_scale"]})


def test_scales_that_are_no_tensors() -> None:
    arguments = with_quantised_caches(make_arguments(F32, False, 1, ""), INT8)
    with pytest.raises(TypeError, match=r"append_kv: k_scale is 1.0, a float; it must be a Tensor or None"):
        lean_attention.append_kv(**{**arguments, "k_scale": 1.0})


def test_opcheck_of_quantised_caches() -> None:  # int8: opcheck multiplies, which torch's fp8 cannot
    arguments = with_quantised_caches(make_arguments(BF16, True, 2, "half"), INT8)
    torch.library.opcheck(torch.ops.lean_attn.append_kv.default, (), arguments)


@pytest.mark.slow
def test_compiles_with_the_decode_step_over_quantised_caches() -> None:
    def step(k_cache, v_cache, k_scale, v_scale, k, v, q, seq_lens):
        lean_attention.append_kv(k_cache, v_cache, k, v, seq_lens, k_scale=k_scale, v_scale=v_scale)
        lens = seq_lens + k.shape[1]
        return lean_attention.decode(q, k_cache, v_cache, lens, k_scale=k_scale, v_scale=v_scale)[0]

    caches, scales = torch.zeros(2, 3, 32, 2, 64, dtype=INT8), torch.zeros(2, 3, 32, 2)
    k, v = torch.randn(2, 3, 5, 2, 64)
    rest = (k, v, torch.randn(3, 5, 4, 64), torch.tensor([0, 0, 0], dtype=torch.int32))
    compiled_caches, compiled_scales = caches.clone(), scales.clone()
    want = step(*caches, *scales, *rest)
    got = torch.compile(step, fullgraph=True)(*compiled_caches, *compiled_scales, *rest)
    torch.testing.assert_close(got, want)
    assert torch.equal(compiled_caches, caches) and torch.equal(compiled_scales, scales)
    assert scales[:, :, :5].all()
