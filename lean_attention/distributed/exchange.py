"""How the ranks' partial states meet: one exchange, merged in the order of ranks.

The ops are those that PyTorch's functional collectives and its compiler call. They begin at once, and
`wait_tensor` waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lean_attention import ops

_collectives = torch.ops._c10d_functional
State = tuple[Tensor, Tensor]  # out [rows, head_dim_v], lse [rows]; a row is a head of a query token

# "auto" chooses "rows" where that receives so many bytes less. In the time of one more collective Ethernet
# carries some 2 MB, and NVLink 6 MB.
BYTES_THAT_PAY = 2**22
EXCHANGES = ("auto", "gather", "rows")


def start_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Those of all ranks along the first dimension; the result must be waited for."""
    return _collectives.all_gather_into_tensor(tensor.contiguous(), group.size(), group.group_name)


def gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[ranks, *tensor.shape]``"""
    whole = wait(start_gather(tensor, group))
    return whole.view(group.size(), *tensor.shape)


def start_broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> Tensor:
    """The tensor of one rank, counted within the group, on all; it must be waited for."""
    return _collectives.broadcast(tensor.contiguous(), source, group.group_name)


def wait(tensor: Tensor) -> Tensor:
    return _collectives.wait_tensor(tensor)


def choose(exchange: str, rows: int, words: int, merged_words: int, ranks: int) -> str:
    """One of "gather" and "rows", by what all ranks have in common. `words` are those of a row on its way."""
    if exchange not in EXCHANGES:
        raise ValueError(f"distributed.decode: exchange is {exchange!r}; it must be one of {EXCHANGES}")
    if exchange == "rows" and rows % ranks:
        raise ValueError(
            f'distributed.decode: exchange is "rows", and {rows} (query tokens times heads) cannot be dealt '
            f"to {ranks} ranks"
        )
    if exchange != "auto":
        return exchange
    gathered, dealt = (received(rows, words, merged_words, ranks, way) for way in ("gather", "rows"))
    return "rows" if rows % ranks == 0 and gathered - dealt > BYTES_THAT_PAY else "gather"


def received(rows: int, words: int, merged_words: int, ranks: int, exchange: str) -> int:
    """Bytes that a rank receives in one step."""
    if exchange == "gather":
        return (ranks - 1) * 4 * rows * words
    return (ranks - 1) * 4 * rows * (words + merged_words) // ranks


def row_words(head_dim_v: int, dtype: torch.dtype) -> int:
    """Words of 4 bytes of a row: its output and its log-sum-exp."""
    return head_dim_v * dtype.itemsize // 4 + 1


def start(
    state: State,
    sinks: Tensor | None,
    group: dist.ProcessGroup,
    exchange: str,
    exchange_dtype: torch.dtype,
    result_dtype: torch.dtype,
) -> Callable[[], State]:
    """Sends a rank's state to the others; what is returned waits, and gives the merged state of all.

    The output travels in `exchange_dtype`, and is rounded where it has more bits.
    `sinks` is ``[rows]``, the same on all ranks: they join when states are merged, so they count once.
    """
    out, lse = state
    words = _pack(out.to(exchange_dtype), lse)
    rank, ranks = group.rank(), group.size()
    merged_words = row_words(out.shape[-1], result_dtype)
    if choose(exchange, len(words), words.shape[-1], merged_words, ranks) == "gather":
        pending = start_gather(words, group)

        def finish() -> State:
            return _merge(wait(pending), ranks, exchange_dtype, sinks, result_dtype)

        return finish

    rows = len(words) // ranks
    pending = _collectives.all_to_all_single(words, [rows] * ranks, [rows] * ranks, group.group_name)

    def finish() -> State:
        own_sinks = None if sinks is None else sinks[rank * rows : (rank + 1) * rows]
        own = _merge(wait(pending), ranks, exchange_dtype, own_sinks, result_dtype)
        return _unpack(wait(start_gather(_pack(*own), group)), result_dtype)

    return finish


def _merge(
    words: Tensor, ranks: int, dtype: torch.dtype, sinks: Tensor | None, result_dtype: torch.dtype
) -> State:
    states = _unpack(words.view(ranks, -1, words.shape[-1]), dtype)
    return merge(*(each.unbind() for each in states), sinks, result_dtype)


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None, dtype: torch.dtype) -> State:
    """Merges states, sinks first and then in this order, into an output of `dtype`."""
    outs, lses = [out.unsqueeze(1) for out in outs], [lse.unsqueeze(0) for lse in lses]
    if sinks is not None:
        outs.insert(0, torch.zeros_like(outs[0]))
        lses.insert(0, sinks.unsqueeze(0))
    out, lse = ops.merge_states(outs, lses, out_dtype=dtype)
    return out.squeeze(1), lse.squeeze(0)


def _pack(out: Tensor, lse: Tensor) -> Tensor:
    """As integers, which nothing on the way rounds or takes for NaN."""
    return torch.cat([out.contiguous().view(torch.int32), lse.view(torch.int32).unsqueeze(-1)], dim=-1)


def _unpack(words: Tensor, dtype: torch.dtype) -> State:
    return words[..., :-1].contiguous().view(dtype), words[..., -1].contiguous().view(torch.float32)
