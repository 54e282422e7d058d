"""Numbers out of range inside tensors: every backend finds the same ones and has the same text for them.

A CPU raises before anything is written. A GPU reports, and writes every row of the outputs all the same.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import lean_attention
from tests.backends import Backend, only
from tests.cases import BF16
from tests.errors import assert_each_raises


def ints(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode_arguments(**changes) -> dict:
    cache = torch.randn(2, 50, 2, 64).to(BF16)
    q = torch.randn(2, 1, 4, 64).to(BF16)
    return {"q": q, "k_cache": cache, "v_cache": cache, "seq_lens": ints(50, 3), **changes}


def paged(**changes) -> dict:
    cache = torch.randn(5, 16, 2, 64).to(BF16)
    table = ints((0, 1), (2, 3))
    return decode_arguments(
        **{"k_cache": cache, "v_cache": cache, "seq_lens": ints(21, 32), "block_table": table, **changes}
    )


def packed(*counts: int, **changes) -> dict:
    return decode_arguments(q=torch.randn(3, 4, 64).to(BF16), cu_seqlens_q=ints(*counts), **changes)


def append_arguments(**changes) -> dict:
    made = {name: torch.randn(3, 25, 2, 64) for name in ("k_cache", "v_cache")}
    made |= {name: torch.randn(3, 2, 2, 64) for name in ("k", "v")}
    return {**made, "seq_lens": ints(13, 0, 7), **changes}


def append_paged(**changes) -> dict:
    made = {name: torch.randn(15, 5, 2, 64) for name in ("k_cache", "v_cache")}
    table = torch.arange(15, dtype=torch.int32).view(3, 5)
    return append_arguments(**{**made, "block_table": table, **changes})


def append_packed(*counts: int) -> dict:
    made = {name: torch.randn(3, 2, 64) for name in ("k", "v")}
    caches = {name: torch.randn(2, 25, 2, 64) for name in ("k_cache", "v_cache")}
    return append_arguments(**made, **caches, seq_lens=ints(13, 0), cu_seqlens=ints(*counts))


def with_rotary(positions: int) -> dict:
    q = torch.randn(3, 2, 4, 64)
    table = torch.rand(positions, 32)
    return append_arguments(rotary_cos=table, rotary_sin=table, q=q)


HOLDS = "the tokens that the cache holds"
PAGES_HOLD = "the tokens that a row of block_table holds"
PER_HEAD = ints((21, 33), (3, 3))
TABLE_PER_HEAD = ints(((0, 1), (2, 3)), ((4, 3), (-1, 2)))
ENTRY = "it must be from 2, the entry before, to 3, the tokens of "
TOO_FAR = "and a new token would go to position 25; {} holds 25 tokens"
CASES = {
    "decode: seq_lens[1] is 51; it must be from 0 to 50, " + HOLDS: decode_arguments(seq_lens=ints(50, 51)),
    "decode: seq_lens[0] is -1; it must be from 0 to 50, " + HOLDS: decode_arguments(seq_lens=ints(-1, 3)),
    "decode: seq_lens[0] is 33; it must be from 0 to 32, " + PAGES_HOLD: paged(seq_lens=ints(33, 1)),
    "decode: seq_lens[0, 1] is 33; it must be from 0 to 32, " + PAGES_HOLD: paged(seq_lens=PER_HEAD),
    "decode: cache_leftpad[1] is -3; it must be at least 0": decode_arguments(cache_leftpad=ints(0, -3)),
    "decode: cache_batch_idx[1] is 2; it must be from 0 to 1, the slots of the cache": decode_arguments(
        cache_batch_idx=ints(0, 2)
    ),
    "decode: block_table[1, 1] is 5; it must be from 0 to 4, the blocks of the cache": paged(
        block_table=ints((0, 1), (2, 5))
    ),
    "decode: block_table[1, 1, 0] is -1; it must be from 0 to 4, the blocks of the cache": paged(
        block_table=TABLE_PER_HEAD
    ),
    "decode: cu_seqlens_q[0] is 1; it must be 0": packed(1, 2, 3),
    "decode: cu_seqlens_q[0] is -1; it must be 0": packed(-1, 2, 3),
    "decode: cu_seqlens_q[0] is 2; it must be 0": packed(2, seq_lens=ints(), cache_batch_idx=ints()),
    "decode: cu_seqlens_q[2] is 1; " + ENTRY + "q": packed(0, 2, 1),
    "decode: cu_seqlens_q[2] is 4; " + ENTRY + "q": packed(0, 2, 4),
    "decode: sequence 1 has 2 query tokens by cu_seqlens_q; tree_mask has columns for 1": packed(
        0, 1, 3, tree_mask=torch.ones(3, 1, dtype=torch.bool)
    ),
    "append_kv: seq_lens[0] is -1; it must be at least 0": append_arguments(seq_lens=ints(-1, 0, 7)),
    "append_kv: seq_lens[1] is 24, " + TOO_FAR.format("the cache"): append_arguments(seq_lens=ints(1, 24, 7)),
    "append_kv: seq_lens[1] is 24, " + TOO_FAR.format("a row of block_table"): append_paged(
        seq_lens=ints(1, 24, 7)
    ),
    "append_kv: cache_batch_idx[2] is 3; it must be from 0 to 2, the slots of the cache": append_arguments(
        cache_batch_idx=ints(0, 1, 3)
    ),
    "append_kv: block_table[0, 2] is 15; it must be from 0 to 14, the blocks of the cache": append_paged(
        block_table=ints((0, 1, 15, 3, 4), (5, 6, 7, 8, 9), (10, 11, 12, 13, 14))
    ),
    "append_kv: a new token of sequence 0 is at position 14; rotary_cos has positions up to 13": with_rotary(
        14
    ),
    "append_kv: cu_seqlens[0] is 1; it must be 0": append_packed(1, 2, 3),
    "append_kv: cu_seqlens[0] is -1; it must be 0": append_packed(-1, 2, 3),
    "append_kv: cu_seqlens[2] is 1; " + ENTRY + "k": append_packed(0, 2, 1),
    "append_kv: cu_seqlens[2] is 4; " + ENTRY + "k": append_packed(0, 2, 4),
}


# In 64 bits. The low 32 bits of these are legal.
BEYOND = 2**32 + 5


def longs(*values) -> Tensor:
    return torch.tensor(values)


def one_token(**changes) -> dict:
    return append_arguments(k=torch.randn(3, 1, 2, 64), v=torch.randn(3, 1, 2, 64), **changes)


CASES |= {
    f"decode: seq_lens[1] is {BEYOND}; it must be from 0 to 50, " + HOLDS: decode_arguments(
        seq_lens=longs(50, BEYOND)
    ),
    f"decode: seq_lens[0] is {-(2**33)}; it must be from 0 to 32, " + PAGES_HOLD: paged(
        seq_lens=longs(-(2**33), 1)
    ),
    f"decode: cache_leftpad[1] is {-(2**33)}; it must be at least 0": decode_arguments(
        cache_leftpad=longs(0, -(2**33))
    ),
    "decode: cache_batch_idx[1] is 4294967296; it must be from 0 to 1, the slots of the cache": (
        decode_arguments(cache_batch_idx=longs(0, 2**32))
    ),
    "decode: block_table[1, 1] is 4294967297; it must be from 0 to 4, the blocks of the cache": paged(
        block_table=longs((0, 1), (2, 2**32 + 1))
    ),
    f"decode: block_table[0, 0] is {-(2**33)}; it must be from 0 to 4, the blocks of the cache": paged(
        block_table=longs((-(2**33), 1), (2, 3))
    ),
    f"decode: cu_seqlens_q[0] is {-(2**33)}; it must be 0": packed(0, 2, 3)
    | {"cu_seqlens_q": longs(-(2**33), 2, 3)},
    f"decode: cu_seqlens_q[2] is {BEYOND}; " + ENTRY + "q": packed(0, 2, 3)
    | {"cu_seqlens_q": longs(0, 2, BEYOND)},
    f"append_kv: seq_lens[0] is {-(2**33)}; it must be at least 0": append_arguments(
        seq_lens=longs(-(2**33), 0, 7)
    ),
    f"append_kv: seq_lens[2] is {2**63 - 1}, and a new token would go to position {2**63 - 1}; the cache "
    "holds 25 tokens": append_arguments(seq_lens=longs(13, 0, 2**63 - 1)),
    f"append_kv: seq_lens[1] is {BEYOND}, and a new token would go to position {BEYOND}; the cache holds 25 "
    "tokens": one_token(seq_lens=longs(13, BEYOND, 7)),
    "append_kv: cache_batch_idx[2] is 4294967296; it must be from 0 to 2, the slots of the cache": (
        append_arguments(cache_batch_idx=longs(0, 1, 2**32))
    ),
    f"append_kv: block_table[0, 2] is {BEYOND}; it must be from 0 to 14, the blocks of the cache": (
        append_paged(block_table=longs((0, 1, BEYOND, 3, 4), (5, 6, 7, 8, 9), (10, 11, 12, 13, 14)))
    ),
    f"append_kv: cu_seqlens[2] is {BEYOND}; " + ENTRY + "k": append_packed(0, 2, 3)
    | {"cu_seqlens": longs(0, 2, BEYOND)},
}


def with_outputs(arguments: dict) -> dict:
    """Its outputs are NaN: what is not written stays so."""
    q, dim = arguments["q"], arguments["v_cache"].shape[-1]
    shape = (q.shape[1], len(q)) if q.dim() == 3 else (len(q), q.shape[2], q.shape[1])
    lse = torch.full(shape, torch.nan)
    return {**arguments, "out": torch.full((*q.shape[:-1], dim), torch.nan, dtype=q.dtype), "lse": lse}


def clones(arguments: dict) -> dict:
    return {name: tensor.clone() for name, tensor in arguments.items()}


def prepared(message: str) -> dict:
    return with_outputs(CASES[message]) if message.startswith("decode") else clones(CASES[message])


def to_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("op", ["decode", "append_kv"])
def test_a_cpu_raises_before_anything_is_written(op: str) -> None:
    cases = [message for message in CASES if message.startswith(op)]
    arguments = {message: prepared(message) for message in cases}
    before = {message: clones(arguments[message]) for message in cases}

    def call(message: str) -> None:
        getattr(lean_attention, op)(**arguments[message])

    wanted = [(message, re.escape(message).removeprefix(f"{op}:\\ ") + "$") for message in cases]
    assert_each_raises(ValueError, op, call, wanted)
    for message, given in arguments.items():
        for argument, tensor in given.items():
            assert torch.equal(to_bits(tensor), to_bits(before[message][argument])), (message, argument)


@only("emulated", "cuda")
@pytest.mark.parametrize("op", ["decode", "append_kv"])
def test_a_gpu_reports_it_and_writes_every_row(op: str, backend: Backend) -> None:
    for message in filter(lambda message: message.startswith(op), CASES):
        arguments = prepared(message)
        backend.take_error()
        outputs = getattr(backend, op)(**arguments)
        assert re.sub(r" \(the first of \d+ such\)$", "", backend.take_error()) == message
        if op == "append_kv":
            continue
        out, lse = outputs
        assert not out.isnan().any() and not lse.isnan().any(), message
        if "cu_seqlens_q" in arguments:
            first = max(int(arguments["cu_seqlens_q"][0]), 0)
            assert (out[:first] == 0).all() and (lse[:, :first] == -torch.inf).all(), message
