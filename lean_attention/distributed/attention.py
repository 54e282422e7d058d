"""Attention over sequences whose tokens are sharded over ranks: one step, and a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lean_attention import ops
from lean_attention.distributed import exchange as exchanges
from lean_attention.distributed import group as groups
from lean_attention.distributed.local import NAME, Call, local_state
from lean_attention.distributed.placement import CONTIGUOUS, Placement, RoundRobin, Shards


def decode(
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    local_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    shards: Shards = CONTIGUOUS,
    seq_lens: Tensor | None = None,
    first_positions: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: str = "auto",
    exchange_dtype: torch.dtype = torch.float32,
    parts: int = 1,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    num_ctas: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`lean_attention.decode` where each rank holds some tokens of every sequence.

    A collective: all ranks of `group` call it, with the same `q` and options, and all get the result. Each
    attends to its own tokens; the partial outputs and log-sum-exps are exchanged, and merged in the order of
    ranks. So the result is bitwise the same from run to run, and on all ranks that have the same hardware.

    Args:
        q: all query tokens, the same on all ranks, in the shapes of :func:`lean_attention.decode`.
        k_shard, v_shard, block_table, cache_batch_idx, k_scale, v_scale: the rank's own cache, in any layout
            that the op has.
        local_lens: ``[batch]``: this rank's tokens of each sequence; 0 for none.
        shards: who has which tokens. ``"contiguous"``: rank 0 has the first ones of each sequence, rank 1
            those after them, and so on, any number each. ``RoundRobin(block)``: blocks of tokens in turn.
        seq_lens: ``[batch]``: tokens of the whole sequences, the query tokens included, on all ranks. Only
            several query tokens, windows and ALiBi need it.
        first_positions: ``[batch]``: with contiguous shards, the position of this rank's first token. Give it
            on all ranks, or on none: where it is needed (for what needs `seq_lens`, and for left padding) and
            missing, one more exchange of an int per sequence sums the `local_lens` of the ranks before.
        group: the ranks, in the order of their tokens; ``None``: all.
        exchange: ``"gather"`` sends all states to all ranks. ``"rows"`` deals the heads of all query tokens
            to the ranks: each merges its own and sends them to all. These are two exchanges, of fewer bytes
            from 3 ranks on (from 2, where q has fewer bits than they). ``"auto"`` takes them where they save
            more than 4 MiB and no head is left over.
        exchange_dtype: of the partial outputs on their way, whatever q's dtype is. float16 and bfloat16 halve
            the bytes, and round each rank's output before it is merged.
        parts: pieces to cut the batch into: the states of one are exchanged while the next is computed. Not
            with `cu_seqlens_q`.
        cache_leftpad: ``[batch]``: leading tokens of the whole sequences that no row sees.
        alibi_slopes: as there; of round-robin shards each block is a call, so blocks should be long.
        sinks: the same on all ranks; they count once.
        cu_seqlens_q, scale, causal, window_left, window_right, softcap, num_ctas: as there.

    Several query tokens read what all of them see once; with windows, ALiBi or left padding each reads for
    itself.

    Returns:
        ``(out, lse)``, as there.

    Raises:
        ValueError: an argument is missing or has the wrong value; `torch.distributed` is not initialised;
            this rank is not in `group`; its backend does not go with the tensors.
        RuntimeError: a rank has died, or has not come within the time-out of `group` (on CPUs; NCCL's own
            watchdog ends the process).
    """
    group = groups.checked_group(NAME, group, q)
    call = Call(
        q,
        k_shard,
        v_shard,
        local_lens,
        block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        num_ctas=num_ctas,
    )
    if not torch.compiler.is_compiling() and groups.is_asked_for():
        others = {"shards": shards, "first_positions": first_positions, "sinks": sinks, "parts": parts}
        ways = {"exchange": exchange, "exchange_dtype": exchange_dtype}
        groups.compare(NAME, group, vars(call) | others | ways)
    _check(call, shards, first_positions, sinks, parts, exchange_dtype)
    heads = q.shape[-2]
    placement = _placement(call, shards, first_positions, group) if call.needs_positions else None

    pieces = [(call, placement)]
    if parts > 1:
        pieces = list(_cut(call, placement, max(min(parts, call.batch), 1)))
    # Said of float32 too: autocast would compute in 16 bits.
    out_dtype = None if exchange_dtype == q.dtype != torch.float32 else torch.float32
    finishes = []
    for piece, placed in pieces:
        state = local_state(piece, placed, out_dtype)
        own_sinks = None if sinks is None else sinks.repeat(len(state[1]) // heads)
        finishes.append(exchanges.start(state, own_sinks, group, exchange, exchange_dtype, q.dtype))
    states = [finish() for finish in finishes]
    out, lse = states[0] if len(states) == 1 else (torch.cat(each) for each in zip(*states, strict=True))
    out, lse = out.view(*q.shape[:-1], v_shard.shape[-1]), lse.view(q.shape[:-1])
    if cu_seqlens_q is not None and sinks is not None:  # which tokens of no sequence do not have
        belong = torch.arange(len(q), device=q.device) < cu_seqlens_q[-1]
        lse = torch.where(belong[:, None], lse, -torch.inf)
    return out, lse.transpose(-1, -2).contiguous()


def check_group(*args, group: dist.ProcessGroup | None = None, **arguments) -> None:
    """Compares what the ranks are about to give to :func:`decode`; it takes the same arguments.

    A collective: all ranks of `group` call it, once before the first step, and all raise the same error.
    With ``LEAN_ATTENTION_CHECK_GROUP=1`` in the environment of all ranks, every eager step begins with it. It
    reads lengths on the host, so it is not for CUDA graphs and compiled steps.

    Raises:
        ValueError: names the first argument whose shape, dtype, device or value differs between ranks, and
            lengths that are negative, do not add up to `seq_lens` or `first_positions`, or are not those of
            round-robin shards.
    """
    given = groups.bound(decode, args, arguments)
    del given["group"]
    groups.compare("check_group", groups.checked_group("check_group", group, given["q"]), given)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local_lens: Tensor,
    *,
    shards: Shards = CONTIGUOUS,
    group: dist.ProcessGroup | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of prompts whose tokens are sharded: each rank's queries to the tokens of all ranks.

    A collective, blockwise over ranks: each rank's K and V are broadcast in turn while those before are
    attended to, and the states are merged in the order of ranks. A rank holds two other shards at a time.
    With contiguous shards the last rank has the most to do; round-robin shards share the work.

    Args:
        q: ``[batch, tokens, heads, head_dim]``: queries of this rank's tokens, in the order of its shard. All
            ranks have the same shape; what is beyond `local_lens` is padding.
        k, v: K and V of the same tokens, ``[batch, tokens, kv_heads, dim]``, in q's dtype.
        local_lens: ``[batch]``: this rank's tokens of each prompt.
        shards, group, sinks, scale, softcap: as in :func:`decode`.

    Returns:
        ``(out, lse)`` of this rank's tokens, ``[batch, tokens, heads, head_dim_v]`` and ``[batch, heads,
        tokens]``; zeros and ``-inf`` for padding.
    """
    name = "distributed.prefill"
    group = groups.checked_group(name, group, q)
    _check_shards(name, shards)
    _check_lengths(name, "local_lens", local_lens, len(q))
    rank, ranks = group.rank(), group.size()
    batch, tokens, heads = q.shape[:3]
    block = shards.block if isinstance(shards, RoundRobin) else max(tokens, 1)
    in_turn = isinstance(shards, RoundRobin)
    lens_of_ranks = exchanges.gather(local_lens, group)
    used = torch.arange(tokens, device=q.device) < local_lens[:, None]
    padding = (0, 0, 0, 0, 0, -tokens % block)
    k, v = (torch.nn.functional.pad(torch.where(used[:, :, None, None], each, 0), padding) for each in (k, v))
    # Each block of queries is a sequence of the op's: they see the same tokens of another rank.
    queries = torch.nn.functional.pad(q, padding).view(-1, block, *q.shape[2:])
    blocks = len(queries) // max(batch, 1)
    index = torch.arange(blocks, device=q.device).repeat(batch)
    sequences = torch.arange(batch, device=q.device).repeat_interleave(blocks)

    merged, own_sinks = None, None if sinks is None else sinks.repeat(queries.shape[:2].numel())
    coming = [exchanges.start_broadcast(each, 0, group) for each in (k, v)]
    for source in range(ranks):
        shard = [exchanges.wait(each) for each in coming]
        if source + 1 < ranks:
            coming = [exchanges.start_broadcast(each, source + 1, group) for each in (k, v)]
        if source > rank and not in_turn:
            continue
        if source == rank:
            seen = (index + 1) * block
        else:
            seen = torch.minimum((index + (source < rank)) * block, lens_of_ranks[source][sequences])
        out, lse = ops.decode(
            queries,
            *shard,
            seen,
            cache_batch_idx=sequences,
            scale=scale,
            causal=source == rank,
            softcap=softcap,
            out_dtype=torch.float32,
        )
        state = out.flatten(0, 2), lse.transpose(1, 2).flatten()
        states = [state] if merged is None else [merged, state]
        merged = exchanges.merge(*zip(*states, strict=True), own_sinks, torch.float32)
        own_sinks = None
    out, lse = (each.view(batch, blocks * block, heads, *each.shape[1:])[:, :tokens] for each in merged)
    out = torch.where(used[:, :, None, None], out, 0).to(q.dtype)
    lse = torch.where(used[:, :, None], lse, -torch.inf)
    return out, lse.transpose(1, 2).contiguous()


def _cut(call: Call, placement: Placement | None, parts: int) -> Iterator[tuple[Call, Placement | None]]:
    for i in range(parts):
        begin, end = (call.batch * n // parts for n in (i, i + 1))
        yield call.part(begin, end), None if placement is None else placement.part(begin, end)


def _placement(call: Call, shards: Shards, first_positions: Tensor | None, group) -> Placement:
    if isinstance(shards, RoundRobin):
        return Placement.round_robin(call.local_lens, shards.block, group.rank(), group.size())
    if first_positions is None:
        before = exchanges.gather(call.local_lens, group)[: group.rank()]
        first_positions = before.sum(dim=0, dtype=call.local_lens.dtype)
    return Placement.contiguous(call.local_lens, first_positions, call.capacity)


def _check(
    call: Call,
    shards: Shards,
    first_positions: Tensor | None,
    sinks: Tensor | None,
    parts: int,
    exchange_dtype: torch.dtype,
) -> None:
    _check_shards(NAME, shards)
    if first_positions is not None and shards != CONTIGUOUS:
        raise ValueError(f"{NAME}: first_positions is given; it follows from {shards} and the rank")
    needs = call.what_needs_seq_lens
    if needs is not None and call.seq_lens is None:
        raise ValueError(f"{NAME}: seq_lens is missing; the lengths of the whole sequences, for {needs}")
    heads = call.q.shape[-2]
    if sinks is not None and (tuple(sinks.shape) != (heads,) or sinks.dtype != torch.float32):
        raise ValueError(
            f"{NAME}: sinks is {str(sinks.dtype).removeprefix('torch.')}{list(sinks.shape)}; "
            f"it must be float32 of shape [{heads}]"
        )
    if exchange_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{NAME}: exchange_dtype is {exchange_dtype}; it must be float32, float16 or bfloat16"
        )
    if parts < 1:
        raise ValueError(f"{NAME}: parts is {parts}; it must be positive")
    if parts > 1 and call.cu_seqlens_q is not None:
        raise ValueError(f"{NAME}: parts is {parts}; with cu_seqlens_q it must be 1")
    for name, lens in (
        ("local_lens", call.local_lens),
        ("seq_lens", call.seq_lens),
        ("first_positions", first_positions),
        ("cache_leftpad", call.cache_leftpad),
    ):
        # Where positions play no part, KV heads may have lengths of their own.
        of_heads = name == "local_lens" and not call.needs_positions and call.k_shard.shape[2]
        if lens is not None or name == "local_lens":
            _check_lengths(NAME, name, lens, call.batch, of_heads)


def _check_shards(name: str, shards: Shards) -> None:
    if shards != CONTIGUOUS and not isinstance(shards, RoundRobin):
        raise ValueError(f'{name}: shards is {shards!r}; it must be "contiguous" or RoundRobin(block)')


def _check_lengths(name: str, argument: str, lens: Tensor, batch: int, kv_heads: int = 0) -> None:
    """`kv_heads`: how many may have lengths of their own."""
    if not isinstance(lens, Tensor):
        raise TypeError(f"{name}: {argument} is a {type(lens).__name__}; it must be a Tensor")
    allowed = [(batch,), (batch, kv_heads)] if kv_heads else [(batch,)]
    if tuple(lens.shape) not in allowed or lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: {argument} is {str(lens.dtype).removeprefix('torch.')}{list(lens.shape)}; "
            f"it must be int32 or int64 of shape {' or '.join(str(list(shape)) for shape in allowed)}"
        )
    if lens.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lens < 0).any()):
        at = (lens < 0).nonzero()[0].tolist()
        raise ValueError(f"{name}: {argument}{at} is {int(lens[tuple(at)])}; it must not be negative")
