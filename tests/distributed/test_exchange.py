"""The bytes of a step, groups of some ranks, compiled steps, prompts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lean_attention
from benchmarks.distributed import CountBytes
from lean_attention import distributed, reference
from lean_attention.distributed import RoundRobin
from lean_attention.distributed.exchange import choose, received, row_words
from tests.cases import BF16, DTYPES, F16, F32, Case, assert_close
from tests.distributed.ranks import run
from tests.distributed.shards import Sharded

SHARDED = Sharded(Case(F32, lens=(300, 40, 0), heads=8, sinks=True), 16)


def count(rank: int, of_ranks: list[dict]) -> None:
    mine, ranks = of_ranks[rank], dist.get_world_size()
    for dtype in DTYPES:
        mine = {
            name: value.to(dtype) if name in ("q", "k_shard", "v_shard") else value
            for name, value in mine.items()
        }
        words, merged_words = row_words(128, F32), row_words(128, dtype)
        for exchange in ("gather", "rows"):
            with CountBytes() as counted:
                distributed.decode(**mine, exchange=exchange)
            want = received(3 * 8, words, merged_words, ranks, exchange)
            assert counted.received == want, f"{exchange} in {dtype}: {counted.received} bytes, not {want}"
        wide, _ = distributed.decode(**mine)
        with CountBytes() as counted:
            narrow, _ = distributed.decode(**mine, exchange_dtype=torch.float16, exchange="gather")
        torch.testing.assert_close(narrow, wide, rtol=max(2e-3, torch.finfo(dtype).eps), atol=2e-3)
        assert counted.received == received(3 * 8, row_words(128, torch.float16), 0, ranks, "gather")


def test_bytes() -> None:
    run(4, count, SHARDED.make(4)[1])


PRECISE = [
    Case(BF16, lens=(2000, 900), heads=8, sinks=True),
    Case(F16, lens=(2000, 900), heads=8),
    Case(BF16, lens=(300, 200), heads=8, q_len=3),
    Case(F16, lens=(300, 200), heads=8, alibi="heads"),
]


def decode_each(rank: int, arguments: list[list[dict]], options: list[dict]) -> list[list[Tensor]]:
    return [[distributed.decode(**of_ranks[rank], **each)[0] for each in options] for of_ranks in arguments]


def test_merging_adds_no_error() -> None:
    """Four ranks are as near to the definition as one process, unless their outputs travel in 16 bits."""
    made = [Sharded(case, 16).make(4) for case in PRECISE]
    options: list[dict] = [{}, {"exchange": "rows"}, {"exchange_dtype": BF16}]
    results, *_ = run(4, decode_each, [of_ranks for _, of_ranks in made], options)
    for case, (whole, _), outs in zip(PRECISE, made, results, strict=True):
        want, _ = reference.decode(**whole)
        one, *ways = (
            (out.double() - want).square().mean() for out in (lean_attention.decode(**whole)[0], *outs)
        )
        gathered, dealt, narrow = (way.div(one).sqrt() for way in ways)
        errors = f"{case}: {gathered:.3f}, {dealt:.3f} and {narrow:.3f} times the error of one process"
        assert max(gathered, dealt) < 1.02 and narrow > 1.1, errors


def under_autocast(rank: int, of_ranks: list[dict]) -> None:
    with torch.autocast("cpu", BF16):
        out, _ = distributed.decode(**of_ranks[rank])
    assert out.dtype == F32
    assert not torch.equal(out, out.bfloat16().float()), "partial outputs were rounded"


def test_autocast_rounds_no_partial_output() -> None:
    # Of one rank, whose partial output is the result.
    run(1, under_autocast, Sharded(Case(F32, lens=(300, 40), heads=8), 16).make(1)[1])


def test_the_choice() -> None:
    """Dealing rows moves less from 3 ranks on, and is chosen where that is much."""
    for rows, ranks, want in [
        (32, 8, "gather"),
        (128 * 32, 8, "rows"),
        (128 * 32, 4, "gather"),
        (128 * 32 + 1, 8, "gather"),  # not divisible
        (4096 * 32, 2, "gather"),
    ]:
        assert choose("auto", rows, 65, 65, ranks) == want, (rows, ranks)


def decode_in(rank: int, members: list[int], of_ranks: list[dict]) -> tuple[Tensor, Tensor] | None:
    group = dist.new_group(members)
    if rank not in members:
        return None
    mine = of_ranks[dist.get_rank(group)]
    return distributed.decode(**mine, group=group)


def test_a_group_of_some_ranks() -> None:
    whole, of_ranks = SHARDED.make(2)
    results = run(4, decode_in, [1, 3], of_ranks)
    assert results[0] is None and results[2] is None
    for result in (results[1], results[3]):
        assert_close("ranks 1 and 3", whole, *result)


def compile_a_step(rank: int, of_ranks: list[dict]) -> None:
    def step(q: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return distributed.decode(**{**of_ranks[rank], "q": q, "local_lens": lens}, exchange="rows")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, lens = of_ranks[rank]["q"], of_ranks[rank]["local_lens"]
    for inputs in ((q, lens), (-q, lens // 2)):
        for got, want in zip(compiled(*inputs), step(*inputs), strict=True):
            assert torch.equal(got, want)


@pytest.mark.slow
def test_a_step_compiles() -> None:
    """With both exchanges of states, and that of lengths."""
    case = Case(F32, lens=(300, 40), q_len=3, leftpad=True, sinks=True)
    run(2, compile_a_step, Sharded(case, "even").make(2)[1], seconds=120)


PROMPTS = (70, 33, 0)
PROMPT_SHARDS = [(1, "even"), (2, 1), (3, "uneven"), (4, 16)]
OPTIONS = {"softcap": 5.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}


def prefill(rank: int, prompts: list[tuple[Tensor, ...]]) -> list[list]:
    """Of each prompt for each of PROMPT_SHARDS, where this rank takes part."""
    results = []
    for ranks, shards in PROMPT_SHARDS:
        group = dist.new_group(range(ranks))
        if rank >= ranks:
            continue
        own = Sharded(Case(lens=PROMPTS), shards).tokens(ranks)
        longest = max(len(tokens) for each in own for tokens in each)
        lens = torch.tensor([len(tokens) for tokens in own[rank]])
        kind = RoundRobin(shards) if isinstance(shards, int) else "contiguous"
        results.append([])
        for prompt in prompts:
            padded = [x.new_full((len(x), longest, *x.shape[2:]), torch.nan) for x in prompt]
            for b, tokens in enumerate(own[rank]):
                for x, whole in zip(padded, prompt, strict=True):
                    x[b, : len(tokens)] = whole[b, tokens]
            results[-1].append(distributed.prefill(*padded, lens, shards=kind, group=group, **OPTIONS))
    return results


def test_prompts() -> None:
    prompts = [[torch.randn(3, 70, heads, 64, dtype=dtype) for heads in (4, 2, 2)] for dtype in DTYPES]
    of_ranks = run(4, prefill, prompts)
    for (i, prompt), (j, (ranks, shards)) in itertools.product(enumerate(prompts), enumerate(PROMPT_SHARDS)):
        results = [each[j - len(PROMPT_SHARDS)][i] for each in of_ranks[:ranks]]
        assert_prompt(f"{ranks} ranks, {shards}", prompt, Sharded(Case(lens=PROMPTS), shards), results)


def assert_prompt(name: str, prompt: list[Tensor], sharded: Sharded, results: list) -> None:
    dtype = prompt[0].dtype
    for b, length in enumerate(PROMPTS):
        piece = [x[b : b + 1, :length] for x in prompt]
        want, want_lse = reference.decode(*piece, **OPTIONS)
        plain = (reference.decode(*piece, **OPTIONS, dtype=dtype)[0].double() - want).abs()
        limit = 2 * (plain.max() if length else 0) + {F32: 2e-6, F16: 1e-4, BF16: 1e-3}[dtype]
        for own, (out, lse) in zip(sharded.tokens(len(results)), results, strict=True):
            n = len(own[b])
            error = (out[b, :n].double() - want[0, own[b]]).abs()
            assert not n or error.max() <= limit, f"{name}, {dtype}: {error.max()} > {limit}"
            wanted = want_lse[0][:, own[b]]
            torch.testing.assert_close(lse[b, :, :n].double(), wanted, rtol=1e-5, atol=1e-5)
            assert not out[b, n:].any() and (lse[b, :, n:] == -torch.inf).all()
