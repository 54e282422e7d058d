"""append_kv where each token has a slot of its own (`slot_mapping`)."""

from __future__ import annotations

import itertools

import pytest
import torch

import lean_attention
from lean_attention import reference
from tests.append_kv.inputs import clones, make_arguments, with_quantised_caches
from tests.backends import Backend, devices, only
from tests.cases import BF16, F32, INT8
from tests.errors import assert_each_raises

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


def test_opcheck_of_flat_slots() -> None:
    arguments = with_slots(make_arguments(F32, True, 1, ""), torch.int64)
    torch.library.opcheck(torch.ops.lean_attn.append_kv.default, (), arguments)
