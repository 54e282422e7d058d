"""append_kv against its definition, on every backend: where rows go, and rotary embedding."""

from __future__ import annotations

import itertools

import pytest
import torch
from allpairspy import AllPairs

import lean_attention
from tests.append_kv.inputs import check, check_bits, clones, make_arguments, pack, with_quantised_caches
from tests.backends import Backend, devices, only
from tests.cases import BF16, DTYPES, F32, INDICES, QUANTISED, SHORT, with_int64
from tests.errors import assert_each_raises

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


def test_errors() -> None:
    def append(changes: dict) -> None:
        lean_attention.append_kv(**{**make_arguments(F32, False, 1, ""), **changes})

    assert_each_raises(ValueError, "append_kv", append, BAD)


@pytest.mark.parametrize("rotary", ["", "half"], ids=["plain", "half"])
def test_opcheck(rotary: str) -> None:
    arguments = make_arguments(F32, True, 2, rotary)
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
