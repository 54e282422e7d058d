"""Bad input gives an error that names the argument, what it got and what it wants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lean_attention
from tests.errors import assert_each_raises, by_argument


def arguments(**changes) -> dict:
    good = {
        "q": torch.randn(2, 1, 8, 64),
        "k_cache": torch.randn(2, 50, 2, 64),
        "v_cache": torch.randn(2, 50, 2, 64),
        "seq_lens": torch.tensor([50, 3], dtype=torch.int32),
    }
    return {**good, **changes}


def I32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


TREE = torch.ones(1, 1, dtype=torch.bool)
PACKED = {"q": torch.randn(3, 8, 64)}
PAGED = {
    "k_cache": torch.randn(5, 16, 2, 64),
    "v_cache": torch.randn(5, 16, 2, 64),
    "block_table": I32(0, 1, 2, 3).view(2, 2),
    "seq_lens": I32(21, 3),
}
INT8 = {name: torch.ones(2, 50, 2, 64, dtype=torch.int8) for name in ("k_cache", "v_cache")}

# Numbers out of range inside tensors: test_bad_numbers.py.
BAD = [
    ({"q": torch.randn(2, 8, 64)}, r"q has shape \[2, 8, 64\]; it must have 4 dimensions, \[batch, q_len"),
    ({"k_cache": torch.randn(50, 2, 64)}, r"k_cache has shape \[50, 2, 64\]"),
    ({"v_cache": torch.randn(2, 50, 2, 64, 1)}, r"v_cache has shape \[2, 50, 2, 64, 1\]"),
    (
        {"k_cache": torch.randn(2, 50, 2, 64).half()},
        "k_cache is torch.float16; it must be torch.float32, like q",
    ),
    (
        {"v_cache": torch.randn(2, 50, 2, 64).bfloat16()},
        "v_cache is torch.bfloat16; it must be torch.float32, like k_cache",
    ),
    (
        {"q": torch.randn(2, 1, 8, 64).double()},
        "q is torch.float64; it must be torch.float32, torch.float16 or torch.bfloat16",
    ),
    (
        {"q": torch.ones(2, 1, 8, 64, dtype=torch.int32)},
        "q is torch.int32; it must be torch.float32, torch.float16 or torch.bfloat16",
    ),
    ({"q": torch.randn(2, 1, 7, 64)}, "q has 7 heads, k_cache 2; the first must be a multiple of the second"),
    ({"q": torch.randn(2, 1, 0, 64)}, "q has no heads"),
    ({"k_cache": torch.randn(2, 50, 0, 64), "v_cache": torch.randn(2, 50, 0, 64)}, "k_cache has no heads"),
    ({"q": torch.randn(2, 1, 8, 72)}, "k_cache has head_dim 64, q has 72; they must be equal"),
    (
        {"q": torch.randn(2, 1, 8, 60), "k_cache": torch.randn(2, 50, 2, 60)},
        "head_dim is 60; it must be a multiple of 8 from 8 to 512",
    ),
    (
        {"q": torch.randn(2, 1, 8, 520), "k_cache": torch.randn(2, 50, 2, 520)},
        "head_dim is 520; it must be a multiple of 8 from 8 to 512",
    ),
    ({"v_cache": torch.randn(2, 50, 2, 12)}, "head_dim_v is 12; it must be a multiple of 8"),
    ({"q": torch.randn(3, 1, 8, 64)}, "k_cache has shape .*dimension 0 must be 3, the batch size of q"),
    ({"v_cache": torch.randn(2, 49, 2, 64)}, "v_cache has shape .*dimension 1 must be 50, the max_len"),
    ({"v_cache": torch.randn(2, 50, 4, 64)}, "v_cache has shape .*dimension 2 must be 2, the num_kv_heads"),
    ({"q": torch.randn(2, 1, 64, 8).transpose(2, 3)}, "q has stride 8 in its last dimension"),
    (
        {"k_cache": torch.randn(2, 50, 64, 2).transpose(2, 3)},
        "k_cache has stride 2 in its last dimension; it must be contiguous there",
    ),
    ({"seq_lens": I32(50, 3).short()}, "seq_lens is torch.int16; it must be torch.int32 or torch.int64"),
    ({"seq_lens": I32(50, 3).float()}, "seq_lens is torch.float32; it must be torch.int32 or torch.i"),
    ({"seq_lens": torch.tensor([[50, 3]], dtype=torch.int32)}, r"seq_lens has shape \[1, 2\]; .*\[batch\]"),
    (
        {"seq_lens": torch.tensor([50], dtype=torch.int32)},
        r"seq_lens has shape \[1\]; its dimension 0 must be 2",
    ),
    ({"seq_lens": torch.tensor([-(2**31), 3], dtype=torch.int32)}, r"seq_lens\[0\] is -2147483648"),
    ({"scale": float("nan")}, "scale is nan; it must be finite"),
    ({"window_left": -2}, r"window_left is -2; it must be -1 \(unbounded\) or at least 0"),
    ({"window_right": -7}, "window_right is -7"),
    ({"num_ctas": -1}, "num_ctas is -1; it must be positive, or 0 to choose"),
    ({"cache_batch_idx": I32(2, 0, 1)}, r"cache_batch_idx has shape \[3\]; its dimension 0 must be 2"),
    (
        {"cache_batch_idx": I32(0, 1).bool()},
        "cache_batch_idx is torch.bool; it must be torch.int32 or torch.i",
    ),
    ({"alibi_slopes": torch.zeros(7)}, r"alibi_slopes has shape \[7\]; its dimension 0 must be 8"),
    ({"alibi_slopes": torch.zeros(8).half()}, "alibi_slopes is torch.float16; it must be torch.float32"),
    ({"alibi_slopes": torch.zeros(3, 8)}, r"alibi_slopes has shape \[3, 8\]; its dimension 0 must be 2"),
    ({"sinks": torch.zeros(2, 8)}, r"sinks has shape \[2, 8\]; it must have 1 dimension, \[num_heads\]"),
    ({"softcap": -1.0}, "softcap is -1; it must be positive and finite, or 0 for none"),
    ({"softcap": float("inf")}, "softcap is inf"),
    (
        {"k_scale": torch.tensor(1.0)},
        "k_scale is given, but the caches are torch.float32; scales are for quantised",
    ),
    ({"tree_mask": torch.ones(1, 1)}, "tree_mask is torch.float32; it must be torch.bool"),
    ({"tree_mask": TREE, "window_left": 4}, "tree_mask cannot be combined with window_left"),
    ({"tree_mask": TREE, "causal": False}, "tree_mask cannot be combined with causal=False"),
    ({"tree_mask": TREE, "alibi_slopes": torch.ones(8)}, "tree_mask cannot be combined with alibi_slopes"),
    ({"tree_mask": TREE.expand(2, 2)}, r"tree_mask has shape \[2, 2\]; its dimension 0 must be 1"),
    ({"cu_seqlens_q": I32(0, 1, 2)}, r"q has shape \[2, 1, 8, 64\]; it must have 3 dimensions, \[total_q"),
    ({**PACKED, "cu_seqlens_q": torch.empty(0, dtype=torch.int32)}, "cu_seqlens_q is empty"),
    ({**PAGED, "block_table": I32(0, 1)}, r"block_table has shape \[2\]; it must have 2 dimensions"),
    ({**PAGED, "block_table": torch.tensor(3).int()}, r"block_table has shape \[\]; it must have 2 dim"),
    ({**PAGED, "block_table": torch.zeros(2, 2)}, "block_table is torch.float32; it must be torch.int32"),
    ({**PAGED, "block_table": torch.zeros(3, 2).int()}, r"block_table has shape \[3, 2\]; its dimension 0"),
    (
        {**PAGED, "block_table": torch.zeros(2, 3, 2).int()},
        r"block_table .* dimension 1 must be 2, the num_kv",
    ),
    (
        {**PAGED, "seq_lens": torch.ones(2, 3).int()},
        r"seq_lens has shape \[2, 3\]; its dimension 1 must be 2",
    ),
    ({**PAGED, "cache_batch_idx": I32(0, 1)}, "cache_batch_idx cannot be combined with block_table"),
    (
        {"seq_lens": torch.ones(2, 2).int()},
        r"seq_lens has shape \[2, 2\]; it must have 1 dimension, \[batch",
    ),
    ({**INT8}, "k_scale is missing; int8 caches need it"),
    (
        {**INT8, "k_scale": torch.ones(3)},
        r"k_scale has shape \[3\]; its dimension 0 must be 2, 1 or the num_kv",
    ),
    ({**INT8, "k_scale": torch.ones(2).half()}, "k_scale is torch.float16; it must be torch.float32"),
    ({**INT8, "k_scale": torch.ones(2, 50, 2, 1)}, r"k_scale has shape \[2, 50, 2, 1\]; it must be a scalar"),
    (
        {**INT8, "v_cache": torch.randn(2, 50, 2, 64)},
        "v_cache is torch.float32; it must be torch.int8, like k_cache",
    ),
]


def decode(changes: dict) -> None:
    lean_attention.decode(**arguments(**changes))


@by_argument(BAD)
def test_decode(cases: list) -> None:
    assert_each_raises(ValueError, "decode", decode, cases)


WRONG_TYPES = [
    ({"seq_lens": [50, 3]}, r"seq_lens is \[50, 3\], a list; it must be a Tensor or None"),
    ({"seq_lens": 50}, "seq_lens is 50, an int; it must be a Tensor or None"),
    ({"seq_lens": np.array([50, 3])}, "seq_lens is array.*, a ndarray; it must be a Tensor or None"),
    ({"q": None}, "q is None; it must be a Tensor$"),
    ({"k_cache": [1.0]}, r"k_cache is \[1.0\], a list; it must be a Tensor$"),
    ({"k_scale": 1.0}, "k_scale is 1.0, a float; it must be a Tensor or None"),
    ({"scale": "0.1"}, "scale is '0.1', a str; it must be a float or None"),
    ({"scale": torch.ones(2)}, r"scale is a Tensor of shape \[2\]; it must be a float or None"),
    ({"softcap": torch.ones(2)}, r"softcap is a Tensor of shape \[2\]; it must be a float$"),
    ({"softcap": None}, "softcap is None; it must be a float$"),
    ({"window_left": None}, "window_left is None; it must be an int$"),
    ({"window_right": 2.0}, "window_right is 2.0, a float; it must be an int$"),
    ({"window_left": 2**70}, "window_left is 1180591620717411303424, an int; it must be an int of 64 bits"),
    ({"num_ctas": 2.5}, "num_ctas is 2.5, a float; it must be an int$"),
    ({"out": [1], "lse": torch.ones(2, 8, 1)}, r"out is \[1\], a list; it must be a Tensor$"),
]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_decode_of_wrong_types(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert_each_raises(TypeError, "decode", decode, WRONG_TYPES)


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({"window_left": np.int64(7)}, {"window_left": 7}),
        ({"softcap": np.float32(2)}, {"softcap": 2.0}),
        ({"softcap": 2, "scale": 1}, {"softcap": 2.0, "scale": 1.0}),
        ({"causal": np.bool_(False)}, {"causal": False}),
        ({"num_ctas": np.int32(3)}, {"num_ctas": 3}),
    ],
    ids=["int64", "float32", "int", "bool", "int32"],
)
def test_numbers_of_other_types(changes: dict, plain: dict) -> None:
    given = arguments()
    got, want = lean_attention.decode(**given, **changes), lean_attention.decode(**given, **plain)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_append_kv_of_wrong_types() -> None:
    given = arguments(k=torch.randn(2, 1, 2, 64), v=torch.randn(2, 1, 2, 64))
    del given["q"]
    cases = [
        ({"seq_lens": [50, 3]}, r"seq_lens is \[50, 3\], a list; it must be a Tensor or None$"),
        ({"v": None}, "v is None; it must be a Tensor$"),
        ({"block_table": [[1]]}, r"block_table is \[\[1\]\], a list; it must be a Tensor or None"),
    ]

    def append(changes: dict) -> None:
        lean_attention.append_kv(**{**given, **changes})

    assert_each_raises(TypeError, "append_kv", append, cases)


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match="k_cache is on meta, q on cpu"):
        lean_attention.decode(**arguments(k_cache=torch.randn(2, 50, 2, 64, device="meta")))


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAN_ATTENTION_CPU", "mmx")
    with pytest.raises(ValueError, match=r"LEAN_ATTENTION_CPU: unknown instruction set mmx .*portable"):
        lean_attention.decode(**arguments())


OUT, LSE = torch.randn(2, 1, 4, 16), torch.randn(2, 4, 1)
BAD_MERGES = [
    ([], [], "outs is empty; there must be at least one state"),
    ([], [LSE], "outs is empty; there must be at least one state"),
    ([OUT], [LSE, LSE], "outs has 1 tensors, lses 2"),
    ([OUT[0]], [LSE], r"lses\[0\] has shape \[2, 4, 1\]; it must have 2 dimensions"),
    ([OUT, OUT.half()], [LSE, LSE], r"outs\[1\] is torch.float16; it must be torch.float32, like outs\[0\]"),
    ([OUT, OUT[..., :8]], [LSE, LSE], r"outs\[1\] has shape \[2, 1, 4, 8\]; its dimension 3 must be 16"),
    ([OUT], [LSE.double()], r"lses\[0\] is torch.float64; it must be torch.float32"),
    ([OUT], [LSE[0]], r"lses\[0\] has shape \[4, 1\]; it must have 3 dimensions"),
    ([OUT], [LSE.transpose(1, 2)], r"lses\[0\] has shape \[2, 1, 4\]; its dimension 1 must be 4"),
]


def test_merge_states() -> None:
    assert_each_raises(ValueError, "merge_states", lean_attention.merge_states, BAD_MERGES)


def test_merge_states_of_wrong_types() -> None:
    cases = [
        (OUT, LSE, r"outs is a Tensor of shape \[2, 1, 4, 16\]; it must be a list of Tensors"),
        (None, [LSE], "outs is None; it must be a list of Tensors"),
        ([OUT, OUT], [LSE, 1.0], r"lses\[1\] is 1.0, a float; it must be a Tensor"),
    ]
    assert_each_raises(TypeError, "merge_states", lean_attention.merge_states, cases)


def test_merge_states_out_dtype() -> None:
    def merge(out_dtype: object) -> None:
        lean_attention.merge_states([OUT], [LSE], out_dtype=out_dtype)

    message = "out_dtype is torch.int8; it must be torch.float32, torch.float16 or torch.bfloat16"
    assert_each_raises(ValueError, "merge_states", merge, [(torch.int8, message)])
    message = "out_dtype is 'float32', a str; it must be a torch.dtype or None"
    assert_each_raises(TypeError, "merge_states", merge, [("float32", message)])


def test_merge_states_base() -> None:
    def merge(base: float) -> None:
        lean_attention.merge_states([OUT], [LSE], base=base)

    message = "base is .*; it must be a finite number above 1"
    cases = [(base, message) for base in (1.0, -2.0, float("nan"), float("inf"))]
    assert_each_raises(ValueError, "merge_states", merge, cases)
