"""What goes wrong between ranks is told, and in time."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lean_attention import distributed
from lean_attention.distributed import RoundRobin
from lean_attention.distributed.group import checked_group
from tests.distributed.ranks import DIED, run
from tests.errors import assert_each_raises

LENS = torch.tensor([5, 9], dtype=torch.int32)


def arguments(**changes) -> dict:
    good = {
        "q": torch.ones(2, 1, 4, 64),
        "k_shard": torch.ones(2, 20, 2, 64),
        "v_shard": torch.ones(2, 20, 2, 64),
        "local_lens": LENS,
    }
    return {**good, **changes}


def call(changes: dict) -> None:
    distributed.decode(**arguments(**changes))


def test_not_initialised() -> None:
    for function in (distributed.decode, distributed.check_group):
        with pytest.raises(ValueError, match=r"torch\.distributed is not initialised; call"):
            function(**arguments())


CACHE = torch.ones(2, 20, 2, 64)
BAD = [
    ({"local_lens": torch.tensor([5, -3])}, r"local_lens\[1\] is -3; it must not be negative"),
    ({"local_lens": torch.tensor([5])}, r"local_lens is int64\[1\]; it must be int32 or int64 of shape"),
    ({"local_lens": LENS.float()}, r"local_lens is float32\[2\]"),
    ({"seq_lens": torch.tensor([-1, 3])}, r"seq_lens\[0\] is -1"),
    ({"first_positions": torch.tensor([0, -2])}, r"first_positions\[1\] is -2"),
    ({"first_positions": LENS, "shards": RoundRobin(4)}, r"first_positions is given; it follows from Round"),
    ({"cache_leftpad": torch.tensor([0, -2])}, r"cache_leftpad\[1\] is -2"),
    ({"shards": "striped"}, "shards is 'striped'; it must be \"contiguous\" or RoundRobin"),
    ({"window_left": 3}, "seq_lens is missing; .* for window_left"),
    ({"alibi_slopes": torch.ones(4)}, "seq_lens is missing; .* for alibi_slopes"),
    ({"q": torch.ones(2, 2, 4, 64)}, "seq_lens is missing; .* for several query tokens"),
    ({"sinks": torch.ones(2)}, r"sinks is float32\[2\]; it must be float32 of shape \[4\]"),
    ({"exchange": "ring"}, "exchange is 'ring'; it must be one of"),
    ({"exchange_dtype": torch.int8}, r"exchange_dtype is torch.int8; it must be float32"),
    ({"exchange": "rows", "q": torch.ones(1, 1, 3, 64), "k_shard": CACHE[:1, :, :1],
      "v_shard": CACHE[:1, :, :1], "local_lens": LENS[:1]}, r'exchange is "rows", and 3 \(.* to 2 ranks'),
    ({"parts": 0}, "parts is 0; it must be positive"),
    ({"parts": 2, "causal": False, "q": torch.ones(3, 4, 64), "cu_seqlens_q": torch.tensor([0, 1, 3])},
     "parts is 2; with cu_seqlens_q it must be 1"),
]  # fmt: skip


def call_wrongly(rank: int) -> None:
    """All ranks find the mistake before the exchange."""
    assert_each_raises(ValueError, "distributed.decode", call, BAD)
    with pytest.raises(TypeError, match="local_lens is a list; it must be a Tensor"):
        call({"local_lens": [5, 9]})
    with pytest.raises(TypeError, match="group is a str; it must be a ProcessGroup or None"):
        call({"group": "all"})
    one = dist.new_group([0])
    if rank == 1:
        for function in (distributed.decode, distributed.check_group):
            with pytest.raises(ValueError, match=r"group has not this rank \(1 of all\)"):
                function(**arguments(group=one))
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"group has gloo for tensors on cuda; GPUs need NCCL"):
        checked_group("decode", None, on_cuda)


# How rank 1 calls, and what all ranks say.
MISMATCHES = [
    ({"q": torch.ones(2, 1, 8, 64)}, r"q is float32\[2, 1, 8, 64\] on cpu on rank 1, .*\[2, 1, 4, 64\]"),
    ({"q": torch.ones(2, 1, 4, 64).half()}, r"q is float16\[2, 1, 4, 64\] on cpu on rank 1, float32"),
    ({"k_shard": CACHE[..., :32]}, r"k_shard is float32\[\*, \*, 2, 32\] on cpu on rank 1, .*2, 64\]"),
    ({"local_lens": torch.tensor([5])}, r"local_lens is int64\[1\]"),
    ({"seq_lens": LENS}, r"seq_lens is int32\[2\] on cpu on rank 1, None on rank 0"),
    ({"shards": RoundRobin(8)}, r"shards is RoundRobin\(block=8\) on rank 1, 'contiguous' on rank 0"),
    ({"window_left": 3}, "window_left is 3 on rank 1, -1 on rank 0"),
    ({"sinks": torch.ones(4)}, r"sinks is float32\[4\] on cpu on rank 1, None"),
    ({"local_lens": -LENS}, r"local_lens\[0\] is -5 on rank 1; it must not be negative"),
]


def compare(rank: int) -> None:
    def check(changes: dict) -> None:
        distributed.check_group(**arguments(**(changes if rank == 1 else {})))

    check({})
    check({"k_shard": torch.ones(7, 33, 2, 64), "v_shard": torch.ones(7, 33, 2, 64)})  # a cache's own size
    assert_each_raises(ValueError, "check_group", check, MISMATCHES)
    distributed.check_group(**arguments(seq_lens=2 * LENS))
    with pytest.raises(ValueError, match=r"seq_lens is \[11, 19\], and the ranks hold \[10, 18\] tokens"):
        distributed.check_group(**arguments(seq_lens=2 * LENS + 1))
    with pytest.raises(ValueError, match=r"seq_lens is \[9, 17\] on rank 1, \[10, 18\] on rank 0"):
        distributed.check_group(**arguments(seq_lens=2 * LENS - rank))

    with pytest.raises(
        ValueError, match=r"first_positions is \[5, 8\] on rank 1, .* before it hold \[5, 9\]"
    ):
        distributed.check_group(**arguments(first_positions=torch.tensor([5, 8]) * rank))
    with pytest.raises(
        ValueError, match=r"local_lens is \[5, 9\] on rank 0; RoundRobin.* deals it \[6, 10\]"
    ):
        distributed.check_group(**arguments(shards=RoundRobin(2)))

    os.environ["LEAN_ATTENTION_CHECK_GROUP"] = "1"
    distributed.decode(**arguments())
    with pytest.raises(ValueError, match=r"decode: causal is False on rank 1, True on rank 0"):
        distributed.decode(**arguments(causal=rank == 0))
    os.environ["LEAN_ATTENTION_CHECK_GROUP"] = "yes"
    with pytest.raises(ValueError, match="LEAN_ATTENTION_CHECK_GROUP is 'yes'; it must be 0 or 1"):
        distributed.decode(**arguments())


@pytest.mark.parametrize("function", [call_wrongly, compare], ids=lambda function: function.__name__)
def test_errors(function) -> None:
    run(2, function)


def lose_a_rank(rank: int, how: str) -> tuple[str, float]:
    distributed.decode(**arguments())
    if rank == 1 and how == "dies":
        os._exit(1)
    if rank == 1:
        time.sleep(3)
        return "", 0.0
    begin = time.monotonic()
    try:
        distributed.decode(**arguments())
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return "", 0.0


@pytest.mark.parametrize("how", ["dies", "stays_away"])
def test_a_lost_rank_ends_the_call_in_time(how: str) -> None:
    first, lost, last = run(3, lose_a_rank, how, time_out=timedelta(seconds=2))
    assert lost == (DIED if how == "dies" else ("", 0.0))
    for error, seconds in (first, last):
        assert error, "nothing raised"
        assert seconds < 3
