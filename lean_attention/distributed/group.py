"""What a call needs of its process group, and the collective that compares the ranks' arguments."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lean_attention.distributed.placement import RoundRobin, Shards

VARIABLE = "LEAN_ATTENTION_CHECK_GROUP"
# Dimensions that a rank has for itself: slots or pages of its cache, tokens in one, width of its block table.
_OWN_DIMS = {"k_shard": (0, 1), "v_shard": (0, 1), "k_scale": (0, 1), "v_scale": (0, 1), "block_table": (-1,)}


def checked_group(name: str, group: dist.ProcessGroup | None, tensor: Tensor) -> dist.ProcessGroup:
    """The group that a call runs on; a ValueError where it cannot."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{name}: torch.distributed is not initialised; call torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if group is None else group
    is_outside = group is dist.GroupMember.NON_GROUP_MEMBER
    if not is_outside and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: group is a {type(group).__name__}; it must be a ProcessGroup or None")
    if is_outside or dist.get_rank(group) < 0:
        raise ValueError(
            f"{name}: group has not this rank ({dist.get_rank()} of all); only its ranks may call"
        )
    if not torch.compiler.is_compiling():
        _check_backend(name, group, tensor.device)
    return group


def _check_backend(name: str, group: dist.ProcessGroup, device: torch.device) -> None:
    try:
        backend = group._get_backend(torch.device(device.type)).name()
    except RuntimeError:
        backend = None
    if backend is None or (device.type != "cpu" and backend.lower() == "gloo"):
        raise ValueError(
            f"{name}: group has {backend or 'no backend'} for tensors on {device.type}; "
            "GPUs need NCCL, CPUs gloo"
        )


def is_asked_for() -> bool:
    """Whether every step is to compare the ranks' arguments. Compiled steps cannot."""
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}; it must be 0 or 1")
    return value == "1"


def compare(name: str, group: dist.ProcessGroup, arguments: dict[str, Any]) -> None:
    """A collective: every rank raises the same ValueError where the arguments of any two do not fit."""
    mine = {argument: _described(argument, value) for argument, value in arguments.items()}
    mine["values"] = {
        argument: arguments[argument].tolist() if isinstance(arguments[argument], Tensor) else None
        for argument in ("local_lens", "seq_lens", "first_positions")
    }
    of_ranks: list = [None] * group.size()
    dist.all_gather_object(of_ranks, mine, group=group)
    values = [each.pop("values") for each in of_ranks]
    for argument in of_ranks[0]:
        first = of_ranks[0][argument]
        for rank, each in enumerate(of_ranks):
            if each[argument] != first:
                raise ValueError(
                    f"{name}: {argument} is {each[argument]} on rank {rank}, {first} on rank 0; "
                    "they must be equal"
                )
    _compare_lengths(name, values, arguments["shards"])


def _described(argument: str, value: Any) -> str:
    """What must be the same on all ranks."""
    if not isinstance(value, Tensor):
        return repr(value)
    sizes = [str(size) for size in value.shape]
    for dim in _OWN_DIMS.get(argument, ()):
        if value.dim() > 2 or argument == "block_table":
            sizes[dim] = "*"
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}] on {value.device.type}"


def _compare_lengths(name: str, values: list[dict], shards: Shards) -> None:
    for rank, each in enumerate(values):
        for argument, lens in each.items():
            low = [b for b, length in enumerate(lens or []) if isinstance(length, int) and length < 0]
            if low:
                raise ValueError(
                    f"{name}: {argument}[{low[0]}] is {lens[low[0]]} on rank {rank}; it must not be negative"
                )
        if each["seq_lens"] != values[0]["seq_lens"]:
            raise ValueError(
                f"{name}: seq_lens is {each['seq_lens']} on rank {rank}, {values[0]['seq_lens']} on rank 0; "
                "they must be equal"
            )
    if values[0]["local_lens"] is None:  # no Tensor, which the call itself will tell
        return
    held = torch.tensor([each["local_lens"] for each in values])  # rank, sequence, KV head if they differ
    total = held.sum(0)
    if values[0]["seq_lens"] not in (None, total.tolist()):
        raise ValueError(
            f"{name}: seq_lens is {values[0]['seq_lens']}, and the ranks hold {total.tolist()} tokens "
            "together; they must be equal"
        )
    for rank, each in enumerate(values):
        first, before = each["first_positions"], held[:rank].sum(0).tolist()
        if first not in (None, before):
            raise ValueError(
                f"{name}: first_positions is {first} on rank {rank}, and the ranks before it hold {before} "
                "tokens"
            )
        if isinstance(shards, RoundRobin):
            want = shards.local_lens(total, rank, len(held)).tolist()
            if each["local_lens"] != want:
                raise ValueError(
                    f"{name}: local_lens is {each['local_lens']} on rank {rank}; {shards} deals it {want}"
                )


def bound(function: Callable, args: tuple, arguments: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults included."""
    call = inspect.signature(function).bind(*args, **arguments)
    call.apply_defaults()
    return dict(call.arguments)
