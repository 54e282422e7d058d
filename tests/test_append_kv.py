"""append_kv against its definition, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

import lean_attention
from lean_attention import reference
from tests.backends import Backend, devices, only
from tests.cases import BF16, DTYPES, E4M3, E5M2, F32, INDICES, INT8, QUANTISED, SHORT, with_int64
from tests.errors import assert_each_raises


def make_arguments(dtype, paged: bool, tokens: int, rotary: str, dims=(64, 40)) -> dict:
    batch, heads, kv_heads, block_size = 3, 6, 2, 5
    lens = torch.tensor([13, 0, 7], dtype=torch.int32)
    made: dict = {"seq_lens": lens}
    if paged:
        blocks, slots = 16, block_size
        made["block_table"] = torch.randperm(blocks, dtype=torch.int32)[: batch * 5].view(batch, 5)
    else:
        blocks, slots = 4, 25
        made["cache_batch_idx"] = torch.randperm(blocks, dtype=torch.int32)[:batch]
    for name, dim in zip(("k", "v"), dims, strict=True):
        # Heads before tokens, with a gap after each row: both must stay as they are.
        pool = torch.randn(blocks, kv_heads, slots, dim + 8).to(dtype)
        made[name + "_cache"] = pool.transpose(1, 2)[..., :dim]
        made[name] = torch.randn(batch, tokens, kv_heads, dim).to(dtype)
    if rotary:
        rotary_dim = {"half": 64, "interleaved": 64, "partial": 24}[rotary]
        angles = torch.rand(30, rotary_dim // 2) * 6
        made["rotary_cos"], made["rotary_sin"] = angles.cos(), angles.sin()
        made["rotary_interleaved"] = rotary != "half"
        made["q"] = torch.randn(batch, tokens, heads, dims[0]).to(dtype)
    return made


def clones(arguments: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def pack(arguments: dict) -> dict:
    """What was in sequences of one length; q stays a view, which is written."""
    tokens = arguments["k"].shape[1]
    packed = {name: arguments[name].flatten(0, 1) for name in ("k", "v", "q") if name in arguments}
    return {**arguments, **packed, "cu_seqlens": torch.arange(4, dtype=torch.int32) * tokens}


def check(backend: Backend, arguments: dict, tolerance: float, packed: bool = False) -> None:
    want = clones(arguments)
    reference.append_kv(**want)
    backend.append_kv(**(pack(arguments) if packed else arguments))
    for name in {"k_cache", "v_cache", "q"} & arguments.keys():
        torch.testing.assert_close(arguments[name], want[name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(arguments["v_cache"], want["v_cache"], rtol=0, atol=0)


# dtype of the tokens and of the caches, paged, tokens, rotary embedding, packed.
PAIRS = [
    pytest.param(
        dtype,
        None if cache == "same" else cache,
        *rest,
        id="-".join(filter(None, [
            SHORT[dtype], SHORT.get(cache), "paged" if rest[0] else "slots", f"q{rest[1]}", rest[2],
            "packed" if rest[3] else "",
        ])),
    )
    for dtype, cache, *rest in AllPairs([
        DTYPES, ["same", *QUANTISED], [False, True], [1, 4], ["", "half", "interleaved", "partial"],
        [False, True],
    ])
]  # fmt: skip


@devices
@pytest.mark.parametrize(("dtype", "quantised", "paged", "tokens", "rotary", "packed"), PAIRS)
def test_matches_the_definition(
    backend: Backend, dtype, quantised, paged: bool, tokens: int, rotary: str, packed: bool
) -> None:
    arguments = make_arguments(dtype, paged, tokens, rotary)
    if quantised:
        check_bits(backend, with_quantised_caches(arguments, quantised), packed)
    else:
        check(backend, arguments, 4 * torch.finfo(dtype).eps, packed)


@devices
def test_tables_in_the_dtype_of_k(backend: Backend) -> None:
    arguments = make_arguments(BF16, True, 2, "half")
    for name in ("rotary_cos", "rotary_sin"):
        arguments[name] = arguments[name].bfloat16()
    check(backend, arguments, 0.02)


@devices
@pytest.mark.parametrize("dtype", QUANTISED, ids=SHORT.get)
def test_quantised_tokens_are_copied(backend: Backend, dtype) -> None:
    arguments = make_arguments(F32, True, 3, "")
    for name in ("k", "v", "k_cache", "v_cache"):
        arguments[name] = arguments[name].to(dtype)
    want = clones(arguments)
    backend.append_kv(**arguments)
    for name in ("k", "v"):
        for b, i in itertools.product(range(3), range(3)):
            position = int(want["seq_lens"][b]) + i
            at = (int(want["block_table"][b, position // 5]), position % 5)
            got = arguments[name + "_cache"].view(torch.uint8)[at]
            assert torch.equal(got, want[name].view(torch.uint8)[b, i])


@devices
@pytest.mark.parametrize("paged", [False, True], ids=["slots", "paged"])
def test_indices_in_int64(backend: Backend, paged: bool) -> None:
    plain = pack(make_arguments(F32, paged, 2, "half"))
    names = [name for name in INDICES if name in plain]
    for some in (names, *([name] for name in names)):
        arguments, wanted = with_int64(clones(plain), some), clones(plain)
        backend.append_kv(**arguments)
        backend.append_kv(**wanted)
        for name in ("k_cache", "v_cache", "q"):
            assert torch.equal(arguments[name], wanted[name]), (name, some)
        assert not torch.equal(arguments["k_cache"], plain["k_cache"])


@only("emulated", "cuda")
def test_queries_of_no_position_stay(backend: Backend) -> None:
    """And nothing before the rotary tables is read."""
    arguments = make_arguments(F32, True, 2, "half")
    arguments["seq_lens"] = torch.tensor([13, -(2**33), 2**63 - 1])
    q = arguments["q"].clone()
    backend.append_kv(**arguments)
    assert "seq_lens" in backend.take_error()
    assert torch.equal(arguments["q"][1:], q[1:]) and not torch.equal(arguments["q"][0], q[0])


@devices
def test_packed_tokens(backend: Backend) -> None:
    arguments = make_arguments(F32, True, 3, "half")
    arguments["cu_seqlens"] = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    for name in ("k", "v", "q"):  # the last two tokens are no sequence's
        arguments[name] = arguments[name].flatten(0, 1)
    q = arguments["q"].clone()
    check(backend, arguments, 4 * torch.finfo(F32).eps)
    assert torch.equal(arguments["q"][7:], q[7:]) and not torch.equal(arguments["q"][:7], q[:7])


@only("emulated", "cuda")  # test_bad_numbers.py: what is told, and that a CPU writes nothing
def test_writes_outside_the_cache_are_left_out(backend: Backend) -> None:
    """And the other sequences' tokens are there."""
    for name, at, value, tokens in [
        ("seq_lens", 1, 24, 5),  # the first of its two
        ("seq_lens", 0, -1, 4),
        ("cache_batch_idx", 2, 4, 4),
        ("block_table", (2, 1), 16, 4),
        ("block_table", (0, 2), -1, 4),
    ]:
        arguments = make_arguments(F32, name == "block_table", 2, "")
        arguments[name][at] = value
        before = clones(arguments)
        backend.append_kv(**arguments)
        assert backend.take_error(), (name, value)
        for cache in ("k_cache", "v_cache"):
            changed = (arguments[cache] != before[cache]).flatten(2).any(dim=2).sum().item()
            assert changed == tokens, (name, value, cache)


def one_place_twice() -> list[tuple[dict, str]]:
    table = torch.arange(15, dtype=torch.int32).view(3, 5)
    met, within = table.clone(), table.clone()
    met[2, 1] = table[0, 2]  # tokens 10 to 14 of sequence 0, 5 to 9 of sequence 2
    within[1, 1] = table[1, 0]
    lens = torch.tensor([12, 3, 7], dtype=torch.int32)
    slots = torch.tensor([1, 3, 1], dtype=torch.int32)
    return [
        (
            {"block_table": met, "seq_lens": lens},
            r"block_table\[2, 1\] is 2, as is block_table\[0, 2\], and a new .* go to slot 2",
        ),
        (
            {"block_table": within, "seq_lens": torch.tensor([12, 0, 7], dtype=torch.int32), "tokens": 6},
            r"block_table\[1, 1\] is 5, as is block_table\[1, 0\], and a new .* go to slot 0",
        ),
        (
            {"cache_batch_idx": slots, "seq_lens": torch.tensor([6, 0, 7], dtype=torch.int32)},
            r"cache_batch_idx\[2\] is 1, as is cache_batch_idx\[0\], and a new .* go to slot 7",
        ),
    ]


@pytest.mark.parametrize(
    ("changes", "message"), one_place_twice(), ids=["two_blocks", "one_sequence", "slots"]
)
def test_one_place_for_two_tokens_is_refused(changes: dict, message: str) -> None:
    tokens = changes.pop("tokens", 2)
    arguments = {**make_arguments(F32, "block_table" in changes, tokens, ""), **changes}
    caches = {cache: arguments[cache].clone() for cache in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=f"append_kv: {message} there; each must have a place of its own"):
        lean_attention.append_kv(**arguments)
    for cache, before in caches.items():
        assert torch.equal(arguments[cache], before), "something was written"


@devices
def test_blocks_may_be_shared_where_nothing_is_written(backend: Backend) -> None:
    arguments = make_arguments(F32, True, 2, "")
    arguments["block_table"][2, 0] = arguments["block_table"][0, 0]  # a common prefix
    arguments["block_table"][1, 1:] = arguments["block_table"][0, 1]
    check(backend, arguments, 1e-6)


@devices
def test_one_slot_for_two_sequences_at_other_positions(backend: Backend) -> None:
    arguments = make_arguments(F32, False, 4, "")
    arguments["cache_batch_idx"] = torch.tensor([1, 1, 1], dtype=torch.int32)
    arguments["seq_lens"] = torch.tensor([8, 4, 12], dtype=torch.int32)
    check(backend, arguments, 1e-6)


@devices
def test_memory_that_overlaps_itself_is_refused(backend: Backend) -> None:
    for name, shape in itertools.product(("k_cache", "v_cache", "q"), ("expanded", "windows")):
        arguments = make_arguments(F32, False, 1, "half")
        tensor = arguments[name]
        if shape == "expanded":
            arguments[name] = tensor[:1].expand_as(tensor)
        else:
            token = tensor.shape[2] * tensor.shape[3]
            arguments[name] = tensor.flatten()[: 100 * token].as_strided(
                tensor.shape, (token, token, tensor.shape[3], 1) if tensor.shape[1] > 1 else (7, 7, 7, 1)
            )
        print(name, shape)
        message = rf"append_kv: {name} has shape .* strides .* elements share memory"
        with pytest.raises(ValueError, match=message):
            backend.append_kv(**arguments)


@devices
def test_one_memory_for_keys_and_values(backend: Backend) -> None:
    arguments = make_arguments(F32, False, 2, "", dims=(64, 64))
    arguments["v_cache"] = arguments["k_cache"]
    with pytest.raises(ValueError, match="append_kv: v_cache is k_cache's memory, and v is not k's"):
        backend.append_kv(**arguments)
    # Latent attention: values are the first dims of keys.
    arguments["v_cache"], arguments["v"] = arguments["k_cache"][..., :40], arguments["k"][..., :40]
    check(backend, arguments, 1e-6)
    tables = {"rotary_cos": torch.ones(30, 8), "rotary_sin": torch.zeros(30, 8)}
    with pytest.raises(ValueError, match="append_kv: v_cache is k_cache's memory; rotary_cos would rotate k"):
        backend.append_kv(**arguments, **tables)


@devices
@pytest.mark.parametrize("paged", [False, True], ids=["pool", "pages"])
def test_keys_and_values_in_one_pool(backend: Backend, paged: bool) -> None:
    arguments = make_arguments(F32, paged, 2, "", dims=(64, 64))
    pool = torch.stack([arguments["k_cache"], arguments["v_cache"]], dim=1 if paged else 2)
    arguments["k_cache"], arguments["v_cache"] = pool.unbind(1 if paged else 2)
    check(backend, arguments, 1e-6)


def with_quantised_caches(arguments: dict, dtype: torch.dtype) -> dict:
    """The caches as `dtype`, in their layout, and scales in another one."""
    made = dict(arguments)
    for name in ("k", "v"):
        cache = arguments[name + "_cache"]
        heads_first = torch.randint(256, (*cache.transpose(1, 2).shape[:3], cache.shape[3] + 8)).byte()
        made[name + "_cache"] = heads_first.view(dtype).transpose(1, 2)[..., : cache.shape[3]]
        made[name + "_scale"] = torch.rand(cache.shape[2], *cache.shape[:2]).movedim(0, 2)
    return made


def to_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int32)


def check_bits(backend: Backend, arguments: dict, packed: bool = False, name: str = "") -> None:
    """Of the caches and scales, all of them: what no token goes to stays."""
    want = clones(arguments)
    reference.append_kv(**want)
    backend.append_kv(**(pack(arguments) if packed else arguments))
    for tensor in ("k_scale", "v_scale", "k_cache", "v_cache"):
        wrong = (to_bits(arguments[tensor]) != to_bits(want[tensor])).nonzero()
        assert len(wrong) == 0, f"{name} {tensor}{wrong[0].tolist()}, and {len(wrong) - 1} more"


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


PACKED = {"k": torch.randn(3, 2, 64), "v": torch.randn(3, 2, 40)}
BAD = [
    ({"k": torch.randn(3, 1, 2, 64).half()}, "v is torch.float32; it must be torch.float16, like k"),
    (
        {"k_cache": torch.randn(4, 25, 2, 64).half()},
        "k_cache is torch.float16; it must be torch.float32, like k",
    ),
    (
        {"k_cache": torch.randn(4, 25, 3, 64)},
        r"k_cache has shape .* dimension 2 must be 2, the num_kv_heads of k",
    ),
    ({"v": torch.randn(3, 2, 2, 40)}, r"v has shape .* dimension 1 must be 1, like k"),
    ({"seq_lens": torch.zeros(3)}, "seq_lens is torch.float32; it must be torch.int32"),
    ({"rotary_cos": torch.ones(9, 32)}, "rotary_sin is missing; rotary_cos and rotary_sin come together"),
    ({"seq_lens": None}, "seq_lens is missing; without slot_mapping it says where tokens go"),
    ({"q": torch.randn(3, 1, 4, 64)}, "q is given without rotary_cos and rotary_sin"),
    ({"rotary_cos": torch.ones(9, 33), "rotary_sin": torch.ones(9, 33)}, ".* rotates 66 dims; k has 64"),
    (
        {"rotary_cos": torch.ones(9, 32), "rotary_sin": torch.ones(9, 32)},
        ".* is at position 13; rotary_cos has pos",
    ),
    ({**PACKED, "cu_seqlens": torch.empty(0, dtype=torch.int32)}, "cu_seqlens is empty; it must have batch"),
    ({"block_table": torch.zeros(3, 5).int()}, "cache_batch_idx cannot be combined with block_table"),
    ({"cache_batch_idx": None}, "k_cache has shape .* dimension 0 must be 3, the batch size of k"),
]


SLOTS = (7, -1, 79, 0, 12)  # of 16 blocks of 5


def with_slots(arguments: dict, dtype: torch.dtype) -> dict:
    """Five packed tokens, and where they go by flat slots."""
    caches = {name: arguments[name] for name in arguments if "cache" in name or "scale" in name}
    caches.pop("cache_batch_idx", None)
    new = {
        name: torch.randn(5, 2, arguments[name].shape[-1]).to(arguments[name].dtype) for name in ("k", "v")
    }
    return {**caches, **new, "slot_mapping": torch.tensor(SLOTS, dtype=dtype)}


@devices
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("quantised", [None, INT8], ids=["same", "int8"])
def test_flat_slots(backend: Backend, quantised, dtype: torch.dtype) -> None:
    arguments = make_arguments(BF16, True, 1, "")
    if quantised:
        arguments = with_quantised_caches(arguments, quantised)
    arguments = with_slots(arguments, dtype)
    before = arguments["k_cache"].clone()
    want = clones(arguments)
    reference.append_kv(**want)
    backend.append_kv(**arguments)
    written = {(slot // 5, slot % 5) for slot in SLOTS if slot != -1}
    for name in arguments:
        if "cache" in name or "scale" in name:
            for at in written:
                assert torch.equal(arguments[name][at], want[name][at]), f"{name}{at}"
    for block, slot in itertools.product(range(16), range(5)):
        if (block, slot) not in written:
            assert torch.equal(arguments["k_cache"][block, slot], before[block, slot])


@devices
def test_no_tokens_for_flat_slots(backend: Backend) -> None:
    arguments = with_slots(make_arguments(F32, True, 1, ""), torch.int64)
    before = arguments["k_cache"].clone()
    for name in ("k", "v", "slot_mapping"):
        arguments[name] = arguments[name][:0]
    backend.append_kv(**arguments)
    assert torch.equal(arguments["k_cache"], before)


BAD_SLOTS = [
    (
        {"slot_mapping": torch.tensor([0, 80, 1, 2, 3])},
        r"slot_mapping\[1\] is 80; it must be from 0 to 79, the slots of all blocks, or -1",
    ),
    ({"slot_mapping": torch.tensor([0, 1, 2, -2, 3])}, r"slot_mapping\[3\] is -2; it must be from 0 to 79"),
    (
        {"slot_mapping": torch.tensor([4, -1, 5, -1, 4])},
        r"slot_mapping\[4\] is 4, as is slot_mapping\[0\]; each new token must have a place of its own",
    ),
    ({"slot_mapping": torch.arange(4)}, r"slot_mapping has shape \[4\]; .* must be 5, the tokens of k"),
    (
        {"slot_mapping": torch.arange(5).short()},
        r"slot_mapping is torch.int16; it must be torch.int32 or torch.int64",
    ),
    (
        {"k": torch.randn(1, 5, 2, 64)},
        r"k has shape .* 3 dimensions, \[total, heads, dim\] with slot_mapping",
    ),
    *(
        ({name: torch.zeros(5, 5).int()}, f"{name} cannot be combined with slot_mapping")
        for name in ("seq_lens", "block_table", "cache_batch_idx", "cu_seqlens", "rotary_cos", "q")
    ),
]


def test_errors_of_flat_slots() -> None:
    arguments = with_slots(make_arguments(F32, True, 1, ""), torch.int64)
    before = arguments["k_cache"].clone()

    def append(changes: dict) -> None:
        lean_attention.append_kv(**{**arguments, **changes})

    assert_each_raises(ValueError, "append_kv", append, BAD_SLOTS)
    assert torch.equal(arguments["k_cache"], before)
    with pytest.raises(TypeError, match=r"append_kv: slot_mapping is \[1\], a list; it must be a Tensor"):
        append({"slot_mapping": [1]})


@only("emulated")
def test_bad_flat_slots_are_told_of_on_cuda(backend: Backend) -> None:
    arguments = with_slots(make_arguments(F32, True, 1, ""), torch.int64)
    arguments["slot_mapping"][1] = 80
    want = clones(arguments)
    want["slot_mapping"][1] = -1
    reference.append_kv(**want)
    backend.append_kv(**arguments)
    assert torch.equal(arguments["k_cache"], want["k_cache"])
    assert "slot_mapping[1] is 80" in backend.device.take_error()


def test_errors() -> None:
    def append(changes: dict) -> None:
        lean_attention.append_kv(**{**make_arguments(F32, False, 1, ""), **changes})

    assert_each_raises(ValueError, "append_kv", append, BAD)


@pytest.mark.parametrize("rotary", ["", "half"], ids=["plain", "half"])
def test_opcheck(rotary: str) -> None:
    arguments = make_arguments(F32, True, 2, rotary)
    torch.library.opcheck(torch.ops.lean_attn.append_kv.default, (), arguments)


def test_opcheck_of_flat_slots() -> None:
    arguments = with_slots(make_arguments(F32, True, 1, ""), torch.int64)
    torch.library.opcheck(torch.ops.lean_attn.append_kv.default, (), arguments)


def test_opcheck_of_quantised_caches() -> None:  # int8: opcheck multiplies, which torch's fp8 cannot
    arguments = with_quantised_caches(make_arguments(BF16, True, 2, "half"), INT8)
    torch.library.opcheck(torch.ops.lean_attn.append_kv.default, (), arguments)


@pytest.mark.slow
def test_compiles_with_the_decode_step() -> None:
    def step(k_cache, v_cache, k, v, q, seq_lens, block_table, cos, sin):
        q = q.clone()
        lean_attention.append_kv(
            k_cache, v_cache, k, v, seq_lens, block_table, q=q, rotary_cos=cos, rotary_sin=sin
        )
        return lean_attention.decode(q, k_cache, v_cache, seq_lens + k.shape[1], block_table)[0]

    arguments = make_arguments(F32, True, 2, "half")
    order = ("k_cache", "v_cache", "k", "v", "q", "seq_lens", "block_table", "rotary_cos", "rotary_sin")
    eager = [arguments[name].clone() for name in order]
    compiled = [arguments[name].clone() for name in order]
    want = step(*eager)
    got = torch.compile(step, fullgraph=True)(*compiled)
    torch.testing.assert_close(got, want)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


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
