"""flash_attn_with_kvcache: FlashAttention-2's parameters and behaviour, against the definitions."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

import lean_attention
from lean_attention import flash_attn_with_kvcache, reference
from tests.cases import BF16, E4M3, F32, SHORT
from tests.errors import assert_each_raises

# As in flash_attn 2.8: names, order, defaults.
FLASH_ATTENTION_2 = {
    "q": inspect.Parameter.empty,
    "k_cache": inspect.Parameter.empty,
    "v_cache": inspect.Parameter.empty,
    "k": None,
    "v": None,
    "rotary_cos": None,
    "rotary_sin": None,
    "cache_seqlens": None,
    "cache_batch_idx": None,
    "cache_leftpad": None,
    "block_table": None,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "rotary_interleaved": True,
    "alibi_slopes": None,
    "num_splits": 0,
    "return_softmax_lse": False,
}


def test_parameters_are_those_of_flash_attention() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    positional = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(FLASH_ATTENTION_2.items())


def rotated(q: Tensor, cos: Tensor, sin: Tensor, lens: Tensor, along: bool, interleaved: bool) -> Tensor:
    out = q.double()
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            position = int(lens[b]) + (i if along else 0)
            out[b, i] = reference.rotate(q[b, i], cos[position], sin[position], interleaved)
    return out


# What a call has: dtype, paged, new tokens, rotary_interleaved or None without rotation, causal, windows.
FEATURES = [
    [F32, BF16],
    [False, True],
    [0, 1, 3],
    [None, True, False],
    [(False, (-1, -1)), (True, (-1, -1)), (False, (20, 0))],
]


def rotates_only_with_new_tokens(values: list) -> bool:
    return len(values) < 4 or values[2] > 0 or values[3] is None


@pytest.mark.parametrize(
    ("dtype", "paged", "new", "rotary", "sees"),
    [
        pytest.param(
            *values,
            id="-".join([
                SHORT[values[0]], "paged" if values[1] else "slots", f"new{values[2]}",
                {None: "plain", True: "interleaved", False: "half"}[values[3]],
                "causal" if values[4][0] else "full" if values[4][1][0] < 0 else "window",
            ]),
        )
        for values in AllPairs(FEATURES, filter_func=rotates_only_with_new_tokens)
    ],
)  # fmt: skip
def test_appends_rotates_and_attends(
    dtype: torch.dtype, paged: bool, new: int, rotary: bool | None, sees: tuple[bool, tuple[int, int]]
) -> None:
    causal, window = sees
    batch, heads, kv_heads, dim, q_len = 2, 6, 2, 64, max(new, 1)
    lens = torch.tensor([45, 0], dtype=torch.int32)
    options: dict = {}
    if paged:
        slots, tokens = 20, 8
        options["block_table"] = torch.randperm(slots, dtype=torch.int32)[:16].view(batch, 8)
    else:
        slots, tokens = 3, 64
        options["cache_batch_idx"] = torch.tensor([2, 0], dtype=torch.int32)
    caches = [torch.randn(slots, tokens, kv_heads, dim).to(dtype) for _ in range(2)]
    q = torch.randn(batch, q_len, heads, dim).to(dtype)
    call: dict = {"cache_seqlens": lens, **options}
    wanted = [cache.clone() for cache in caches]
    q_seen = q.double()
    if new:
        call["k"], call["v"] = (torch.randn(batch, new, kv_heads, dim).to(dtype) for _ in range(2))
        tables: dict = {}
        if rotary is not None:
            angles = torch.rand(64, 16) * 6
            tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": rotary}
            q_seen = rotated(
                q, tables["rotary_cos"], tables["rotary_sin"], lens, causal or window != (-1, -1), rotary
            )
        call.update(tables)
        reference.append_kv(*wanted, call["k"], call["v"], lens, **options, **tables)
    q_before = q.clone()
    out, lse = flash_attn_with_kvcache(
        q, *caches, **call, causal=causal, window_size=window, return_softmax_lse=True, num_splits=5
    )
    assert torch.equal(q, q_before), "q was changed"
    tolerance = {F32: 1e-5, BF16: 2e-2}[dtype]
    for got, want in zip(caches, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    want, want_lse = reference.decode(
        q_seen, *caches, lens + new, **options, causal=causal, window_left=window[0], window_right=window[1]
    )
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=tolerance, atol=4 * tolerance)


def test_one_length_for_all_and_only_out() -> None:
    q, cache = torch.randn(2, 1, 4, 64), torch.randn(2, 50, 2, 64)
    out = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=33)
    lens = torch.full((2,), 33, dtype=torch.int32)
    torch.testing.assert_close(out.double(), reference.decode(q, cache, cache, lens)[0], rtol=1e-5, atol=1e-5)
    whole = flash_attn_with_kvcache(q, cache, cache)
    torch.testing.assert_close(whole.double(), reference.decode(q, cache, cache)[0], rtol=1e-5, atol=1e-5)


def test_packed_queries_and_new_tokens() -> None:
    """Continuous batching: a chunk of three tokens, one of one and one of none, rotated and appended."""
    lens = torch.tensor([9, 30, 4], dtype=torch.int32)
    ends = torch.tensor([0, 3, 4, 4], dtype=torch.int32)
    caches = [torch.randn(12, 8, 2, 64) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    table = torch.randperm(12, dtype=torch.int32).view(3, 4).repeat(1, 2)[:, :5].contiguous()
    q, k, v = torch.randn(4, 4, 64), torch.randn(4, 2, 64), torch.randn(4, 2, 64)
    angles = torch.rand(64, 32) * 6
    common = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "causal": True, "block_table": table}
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lens, cu_seqlens_q=ends, cu_seqlens_k_new=ends,
        return_softmax_lse=True, **common,
    )  # fmt: skip
    for b in range(3):
        own = slice(int(ends[b]), int(ends[b + 1]))
        if own.start == own.stop:
            continue
        common["block_table"] = table[b : b + 1]
        want, want_lse = flash_attn_with_kvcache(
            q[None, own], *before, k[None, own], v[None, own], cache_seqlens=lens[b : b + 1],
            return_softmax_lse=True, **common,
        )  # fmt: skip
        torch.testing.assert_close(out[own], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, own], want_lse[0], rtol=1e-5, atol=1e-5)
    for got, want in zip(caches, before, strict=True):
        torch.testing.assert_close(got, want)


def test_indices_in_int64() -> None:
    lens, ends = I32(9, 30, 4), I32(0, 3, 4, 4)
    table = torch.randperm(15, dtype=torch.int32).view(3, 5)
    q, k, v = torch.randn(4, 4, 64), torch.randn(4, 2, 64), torch.randn(4, 2, 64)
    angles = torch.rand(64, 32) * 6
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    caches = [torch.randn(15, 8, 2, 64) for _ in range(2)]
    for causal in (True, False):
        results = []
        for wide in (torch.Tensor.int, torch.Tensor.long):
            written, counts = [cache.clone() for cache in caches], wide(ends)
            out = flash_attn_with_kvcache(
                q, *written, k, v, **rotary, cache_seqlens=wide(lens), cu_seqlens_q=counts,
                cu_seqlens_k_new=counts, page_table=wide(table), causal=causal,
                cache_leftpad=wide(I32(0, 3, 0)),
            )  # fmt: skip
            results.append((out, *written))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [20, 57])
@pytest.mark.parametrize("dtype", [F32, E4M3], ids=SHORT.get)
def test_head_dims_that_are_no_multiple_of_8(dim: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 1, 4, dim), torch.randn(2, 50, 2, dim), torch.randn(2, 50, 2, dim + 3)
    out = flash_attn_with_kvcache(q, k.to(dtype), v.to(dtype))
    assert out.shape == (2, 1, 4, dim + 3)
    want, _ = reference.decode(q, k.to(dtype), v.to(dtype))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_quantised_caches_and_sinks() -> None:
    q, sinks = torch.randn(2, 1, 4, 64, dtype=BF16), torch.randn(4)
    k, v = (torch.randn(2, 50, 2, 64).to(torch.float8_e5m2) for _ in range(2))
    scales = [torch.rand(2, 2) + 0.5 for _ in range(2)]
    out = flash_attn_with_kvcache(q, k, v, k_descale=scales[0], v_descale=scales[1], sinks=sinks)
    want, _ = reference.decode(q, k, v, k_scale=scales[0], v_scale=scales[1], sinks=sinks)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


def test_what_does_not_apply_is_accepted_and_changes_nothing() -> None:
    q, cache = torch.randn(2, 1, 4, 64), torch.randn(2, 50, 2, 64)
    plain = flash_attn_with_kvcache(q, cache, cache)
    other = flash_attn_with_kvcache(
        q, cache, cache, num_splits=7, max_seqlen_q=1, scheduler_metadata=torch.zeros(3), pack_gqa=False,
        sm_margin=8,
    )  # fmt: skip
    assert torch.equal(plain, other)


def I32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CACHE, TABLE = torch.randn(2, 50, 2, 64), torch.arange(6, dtype=torch.int32).view(2, 3)
NEW = {"k": torch.randn(2, 1, 2, 64), "v": torch.randn(2, 1, 2, 64)}
PAGES = {"k_cache": torch.randn(6, 16, 2, 64), "v_cache": torch.randn(6, 16, 2, 64)}
INT8 = {name: torch.ones(2, 50, 2, 64, dtype=torch.int8) for name in ("k_cache", "v_cache")}


# They name what the caller wrote, also where an op found it.
BAD = [
    ({"cache_seqlens": I32(50, 51)}, r"cache_seqlens\[1\] is 51; it must be from 0 to 50"),
    ({"cache_seqlens": 51}, "cache_seqlens is 51; it must be from 0 to 50"),
    ({"cache_seqlens": -1}, "cache_seqlens is -1; it must be from 0"),
    ({"cache_seqlens": 2**40}, "cache_seqlens is 1099511627776; it must be from 0"),
    (
        {"cache_seqlens": I32(50, 3).short()},
        "cache_seqlens is torch.int16; it must be torch.int32 or torch.i",
    ),
    ({"cache_seqlens": I32(50)}, r"cache_seqlens has shape \[1\]; its dimension 0 must be 2"),
    (
        {**NEW, "cache_seqlens": I32(3, 50)},
        r"cache_seqlens\[1\] is 50, and a new token would go to position",
    ),
    ({**NEW, "cache_seqlens": 50}, "cache_seqlens is 50, and a new token would go to position 50"),
    ({"k_descale": torch.tensor(1.0)}, "k_descale is given, but the caches are torch.float32"),
    ({**INT8}, "k_descale is missing; int8 caches need it"),
    ({**INT8, "k_descale": torch.tensor(1.0)}, "v_descale is missing; int8 caches need it"),
    ({"softmax_scale": float("nan")}, "softmax_scale is nan; it must be finite"),
    ({"softcap": -2.0}, "softcap is -2; it must be positive and finite"),
    ({"window_size": (-2, 0)}, r"window_size\[0\] is -2; it must be -1"),
    ({"window_size": (5, -3)}, r"window_size\[1\] is -3; it must be -1"),
    ({"window_size": 5}, r"window_size is 5; it must be \(left, right\) or None"),
    ({"window_size": (1, 2, 3)}, r"window_size is \(1, 2, 3\); it must be \(left, right\) or None"),
    (
        {**PAGES, "block_table": TABLE.short()},
        "block_table is torch.int16; it must be torch.int32 or torch.i",
    ),
    ({**PAGES, "page_table": TABLE.short()}, "page_table is torch.int16; it must be torch.int32 or torch.i"),
    ({**PAGES, "page_table": TABLE - 1}, r"page_table\[0, 0\] is -1; it must be from 0 to 5"),
    (
        {**PAGES, "page_table": TABLE, "cache_seqlens": 99},
        "cache_seqlens is 99; .* a row of page_table holds",
    ),
    (
        {"page_table": TABLE, "cache_batch_idx": I32(0, 1)},
        "cache_batch_idx cannot be combined with page_table",
    ),
    (
        {**NEW, **PAGES, "page_table": TABLE[:1].expand(2, 3), "cache_seqlens": 4},
        r"page_table\[1, 0\] is 0, as is page_table\[0, 0\], and a new token of each",
    ),
    (
        {
            "k": torch.randn(2, 2, 64),
            "v": torch.randn(2, 2, 64),
            "cache_seqlens": 4,
            "cu_seqlens_k_new": I32(1, 1, 2),
        },
        r"cu_seqlens_k_new\[0\] is 1; it must be 0",
    ),
    (
        {"q": torch.randn(2, 4, 64), "cu_seqlens_q": I32(1, 1, 2)},
        r"cu_seqlens_q\[0\] is 1; it must be 0",
    ),
    (
        {"q": torch.randn(2, 4, 64)},
        r"q has shape \[2, 4, 64\]; it must have 4 dimensions, \[batch, seqlen_q",
    ),
    (
        {"cu_seqlens_q": I32(0, 1, 2)},
        r"q has shape \[2, 1, 4, 64\]; it must have 3 dimensions, \[tokens of",
    ),
    ({"v_cache": torch.randn(50, 2, 64)}, r"v_cache has shape \[50, 2, 64\]; it must have 4 dimensions"),
    ({"q": torch.tensor(1.0)}, r"q has shape \[\]; it must have 4 dimensions"),
    ({"q": torch.randn(2, 1, 4, 57)}, "k_cache has headdim 64, q has 57; they must be equal"),
    (
        {"q": torch.randn(2, 1, 4, 60), "k_cache": torch.randn(2, 50, 2, 57)},
        "k_cache has headdim 57, q has 60; they must be equal",
    ),
    (
        {"q": torch.randn(2, 1, 4, 515), "k_cache": torch.randn(2, 50, 2, 515)},
        "headdim is 515; it must be from 1 to 512",
    ),
    (
        {"k": torch.randn(3, 1, 2, 64), "v": torch.randn(3, 1, 2, 64), "cache_seqlens": 4},
        "k is of 3 sequences, q of 2; they must be as many",
    ),
    ({"rotary_sin": torch.ones(9, 8)}, "rotary_sin is given without k and v"),
    ({"cu_seqlens_k_new": I32(0, 1, 2)}, "cu_seqlens_k_new is given without k and v"),
    ({"k": torch.randn(2, 1, 2, 64)}, "v is missing; k and v come together"),
    ({"rotary_cos": torch.ones(9, 8)}, "rotary_cos is given without k and v"),
    ({"k": torch.randn(2, 1, 2, 64), "v": torch.randn(2, 1, 2, 64)}, "k is given without cache_seqlens"),
    (
        {"page_table": torch.ones(1), "block_table": torch.ones(1)},
        "block_table and page_table are the same",
    ),
    ({"qv": torch.ones(1)}, "qv is not supported"),
    ({"attention_chunk": 128}, "attention_chunk is not supported"),
]


def call(changes: dict) -> None:
    good = {"q": torch.randn(2, 1, 4, 64), "k_cache": CACHE.clone(), "v_cache": CACHE.clone()}
    flash_attn_with_kvcache(**{**good, **changes})


def test_errors() -> None:
    assert_each_raises(ValueError, "flash_attn_with_kvcache", call, BAD)


WRONG_TYPES = [
    ({"cache_seqlens": [3, 5]}, r"cache_seqlens is \[3, 5\], a list; it must be an int or a Tensor"),
    ({"cache_seqlens": 3.0}, "cache_seqlens is 3.0, a float; it must be an int or a Tensor"),
    ({"cache_seqlens": np.array([3, 5])}, "cache_seqlens is array.*, a ndarray; it must be an int or"),
    ({"q": None}, "q is None; it must be a Tensor"),
    ({"v_cache": [1]}, r"v_cache is \[1\], a list; it must be a Tensor"),
    (
        {**NEW, "cache_seqlens": 3, "sinks": [1.0]},
        r"sinks is \[1.0\], a list; it must be a Tensor or None",
    ),
    ({"block_table": [[0]]}, r"block_table is \[\[0\]\], a list; it must be a Tensor or None"),
    ({"page_table": [[0]]}, r"page_table is \[\[0\]\], a list; it must be a Tensor or None"),
    ({"cu_seqlens_q": [0, 1]}, r"cu_seqlens_q is \[0, 1\], a list; it must be a Tensor or None"),
    ({"k_descale": 1.0}, "k_descale is 1.0, a float; it must be a Tensor or None"),
    ({"softmax_scale": "1"}, "softmax_scale is '1', a str; it must be a float or None"),
    ({"softcap": [0]}, r"softcap is \[0\], a list; it must be a float or None"),
    ({"window_size": (1.5, 0)}, r"window_size\[0\] is 1.5, a float; it must be an int or None"),
]


def test_wrong_types() -> None:
    cache = CACHE.clone()

    def call_with_one_cache(changes: dict) -> None:
        call({"k_cache": cache, **changes})

    assert_each_raises(TypeError, "flash_attn_with_kvcache", call_with_one_cache, WRONG_TYPES)
    assert torch.equal(cache, CACHE), "something was written"


OTHER_TYPES = [
    ({"cache_seqlens": np.int64(33)}, {"cache_seqlens": 33}),
    ({"window_size": None}, {}),
    ({"window_size": (None, None)}, {}),
    ({"window_size": [9, None]}, {"window_size": (9, -1)}),
    ({"window_size": (np.int32(9), np.int64(0))}, {"window_size": (9, 0)}),
    ({"window_size": np.array([9, 0])}, {"window_size": (9, 0)}),
    ({"softcap": None}, {}),
    ({"softcap": np.float32(5)}, {"softcap": 5.0}),
    ({"softmax_scale": 1}, {"softmax_scale": 1.0}),
    ({"softmax_scale": np.float64(0.5)}, {"softmax_scale": 0.5}),
    ({"causal": 1}, {"causal": True}),
    ({"causal": np.bool_(True)}, {"causal": True}),
    ({"attention_chunk": np.int64(0)}, {}),
    ({"num_splits": np.int64(3)}, {}),
]


def test_numbers_of_other_types() -> None:
    q = torch.randn(2, 3, 4, 64)
    for given, plain in OTHER_TYPES:
        got = flash_attn_with_kvcache(q, CACHE, CACHE, **given)
        assert torch.equal(got, flash_attn_with_kvcache(q, CACHE, CACHE, **plain)), given


def test_compiles() -> None:
    def step(q, k_cache, v_cache, k, v, cos, sin, lens):
        return lean_attention.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lens, causal=True
        )

    angles = torch.rand(64, 32) * 6
    arguments = [
        torch.randn(2, 1, 4, 64),
        *torch.randn(2, 2, 50, 2, 64),
        *torch.randn(2, 2, 1, 2, 64),
        angles.cos(),
        angles.sin(),
        torch.tensor([7, 30], dtype=torch.int32),
    ]
    eager, compiled = ([a.clone() for a in arguments] for _ in range(2))
    want = step(*eager)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*compiled), want)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)
