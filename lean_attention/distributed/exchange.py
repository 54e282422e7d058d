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
State = tuple[Tensor, Tensor]  # out [tokens, heads, head_dim_v], lse [tokens, heads]

# "auto" chooses "heads" where that receives so many bytes less. A link carries them in about the time of one
# more collective.
BYTES_THAT_PAY = 2**20
EXCHANGES = ("auto", "gather", "heads")


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


def choose(exchange: str, tokens: int, heads: int, words: int, merged_words: int, ranks: int) -> str:
    """ "gather" or "heads", from what all ranks have in common. `words` are those of a row."""
    if exchange not in EXCHANGES:
        raise ValueError(f"distributed.decode: exchange is {exchange!r}; it must be one of {EXCHANGES}")
    if exchange != "auto":
        if exchange == "heads" and heads % ranks:
            raise ValueError(
                f'distributed.decode: exchange is "heads", and {heads} heads cannot be dealt to {ranks} ranks'
            )
        return exchange
    if heads % ranks:
        return "gather"
    saved = received(tokens, heads, words, merged_words, ranks, "gather") - received(
        tokens, heads, words, merged_words, ranks, "heads"
    )
    return "heads" if saved > BYTES_THAT_PAY else "gather"


def received(tokens: int, heads: int, words: int, merged_words: int, ranks: int, exchange: str) -> int:
    """Bytes that a rank receives in one step."""
    state, merged = 4 * tokens * heads * words, 4 * tokens * heads * merged_words
    if exchange == "gather":
        return (ranks - 1) * state
    return (ranks - 1) * (state + merged) // ranks


def row_words(head_dim_v: int, dtype: torch.dtype) -> int:
    """Words of 4 bytes of a row: its output and its log-sum-exp."""
    return head_dim_v * dtype.itemsize // 4 + 1


def travelling_dtype(out: torch.dtype, exchange_dtype: torch.dtype) -> torch.dtype:
    """That of the outputs where it is the narrower one: the same values in fewer bytes."""
    return out if out.itemsize < exchange_dtype.itemsize else exchange_dtype


def start(
    state: State,
    sinks: Tensor | None,
    group: dist.ProcessGroup,
    exchange: str,
    exchange_dtype: torch.dtype,
    result_dtype: torch.dtype,
) -> Callable[[], State]:
    """Sends a rank's state to the others; what is returned waits, and gives the merged state of all.

    `sinks` is ``[heads]``, the same on all ranks: they join when states are merged, so they count once.
    """
    out, lse = state
    dtype = travelling_dtype(out.dtype, exchange_dtype)
    words = _pack(out.to(dtype), lse)
    rank, ranks = group.rank(), group.size()
    if exchange == "gather":
        pending = start_gather(words, group)

        def finish() -> State:
            states = _unpack(wait(pending).view(ranks, *words.shape), dtype)
            return merge(*(each.unbind() for each in states), sinks, result_dtype)

        return finish

    heads = words.shape[1] // ranks
    pending = _collectives.all_to_all_single(
        words.transpose(0, 1).contiguous(), [heads] * ranks, [heads] * ranks, group.group_name
    )

    def finish() -> State:
        states = _unpack(wait(pending).view(ranks, heads, words.shape[0], -1).transpose(1, 2), dtype)
        own_sinks = None if sinks is None else sinks[rank * heads : (rank + 1) * heads]
        own = _pack(*merge(*(each.unbind() for each in states), own_sinks, result_dtype))  # token, head, word
        merged = wait(start_gather(own.transpose(0, 1), group))
        return _unpack(merged.transpose(0, 1), result_dtype)

    return finish


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None, dtype: torch.dtype) -> State:
    """Merges states in this order: a rank's ``[tokens, heads, head_dim_v]`` and ``[tokens, heads]`` each."""
    partial_outs, partial_lses = [out.float() for out in outs], [lse.t() for lse in lses]
    if sinks is not None:
        partial_outs.insert(0, torch.zeros_like(partial_outs[0]))
        partial_lses.insert(0, sinks[:, None].expand_as(partial_lses[0]))
    out, lse = ops.merge_states(partial_outs, partial_lses)
    return out.to(dtype), lse.t()


def _pack(out: Tensor, lse: Tensor) -> Tensor:
    """As integers, which nothing on the way rounds or takes for NaN."""
    words = lse.contiguous().view(torch.int32).unsqueeze(-1)
    return torch.cat([out.contiguous().view(torch.int32), words], dim=-1)


def _unpack(words: Tensor, dtype: torch.dtype) -> State:
    return words[..., :-1].contiguous().view(dtype), words[..., -1].contiguous().view(torch.float32)
