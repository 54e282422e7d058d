"""Bad input gives an error that names the argument, what it got and what it wants."""

from __future__ import annotations

import pytest
import torch

import lean_attention


def arguments(**changes) -> dict:
    good = {
        "q": torch.randn(2, 1, 8, 64),
        "k_cache": torch.randn(2, 50, 2, 64),
        "v_cache": torch.randn(2, 50, 2, 64),
        "seq_lens": torch.tensor([50, 3], dtype=torch.int32),
    }
    return {**good, **changes}


BAD = [
    ({"q": torch.randn(2, 8, 64)}, r"q has shape \[2, 8, 64\]; it must have 4 dimensions, \[batch, q_len"),
    ({"k_cache": torch.randn(50, 2, 64)}, r"k_cache has shape \[50, 2, 64\]"),
    ({"v_cache": torch.randn(2, 50, 2, 64, 1)}, r"v_cache has shape \[2, 50, 2, 64, 1\]"),
    ({"k_cache": torch.randn(2, 50, 2, 64).half()}, "k_cache is Half; it must be Float, like q"),
    ({"v_cache": torch.randn(2, 50, 2, 64).bfloat16()}, "v_cache is BFloat16; it must be Float, like q"),
    ({"q": torch.randn(2, 1, 8, 64).double()}, "q is Double; it must be Float, Half or BFloat16"),
    ({"q": torch.ones(2, 1, 8, 64, dtype=torch.int32)}, "q is Int; it must be Float, Half or BFloat16"),
    ({"q": torch.randn(2, 1, 7, 64)}, "q has 7 heads, k_cache 2; the first must be a multiple of the second"),
    ({"q": torch.randn(2, 1, 0, 64)}, "q has no heads"),
    ({"k_cache": torch.randn(2, 50, 0, 64), "v_cache": torch.randn(2, 50, 0, 64)}, "k_cache has no heads"),
    ({"q": torch.randn(2, 1, 8, 72)}, "k_cache has head_dim 64, q has 72; they must be equal"),
    (
        {"q": torch.randn(2, 1, 8, 60), "k_cache": torch.randn(2, 50, 2, 60)},
        "head_dim is 60; it must be a multiple of 8 from 8 to 256",
    ),
    (
        {"q": torch.randn(2, 1, 8, 264), "k_cache": torch.randn(2, 50, 2, 264)},
        "head_dim is 264; it must be a multiple of 8 from 8 to 256",
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
    ({"seq_lens": torch.tensor([50, 3])}, "seq_lens is Long; it must be Int"),
    ({"seq_lens": torch.tensor([50.0, 3.0])}, "seq_lens is Float; it must be Int"),
    ({"seq_lens": torch.tensor([[50, 3]], dtype=torch.int32)}, r"seq_lens has shape \[1, 2\]; .*\[batch\]"),
    (
        {"seq_lens": torch.tensor([50], dtype=torch.int32)},
        r"seq_lens has shape \[1\]; its dimension 0 must be 2",
    ),
    (
        {"seq_lens": torch.tensor([50, 51], dtype=torch.int32)},
        r"seq_lens\[1\] is 51; it must be from 0 to 50",
    ),
    ({"seq_lens": torch.tensor([-1, 3], dtype=torch.int32)}, r"seq_lens\[0\] is -1; it must be from 0 to 50"),
    ({"seq_lens": torch.tensor([-(2**31), 3], dtype=torch.int32)}, r"seq_lens\[0\] is -2147483648"),
    ({"scale": float("nan")}, "scale is nan; it must be finite"),
    ({"window_left": -2}, r"window_left is -2; it must be -1 \(unbounded\) or at least 0"),
    ({"window_right": -7}, "window_right is -7"),
    ({"num_ctas": -1}, "num_ctas is -1; it must be positive, or 0 to choose"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table is not yet supported"),
    ({"cache_batch_idx": torch.zeros(2, dtype=torch.int32)}, "cache_batch_idx is not yet supported"),
    ({"cache_leftpad": torch.zeros(2, dtype=torch.int32)}, "cache_leftpad is not yet supported"),
    ({"alibi_slopes": torch.zeros(8)}, "alibi_slopes is not yet supported"),
    ({"sinks": torch.zeros(8)}, "sinks is not yet supported"),
    ({"softcap": 30.0}, "softcap is not yet supported"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_decode(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"decode: {message}"):
        lean_attention.decode(**arguments(**changes))


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
    ([OUT[0]], [LSE], r"outs\[0\] has shape \[1, 4, 16\]"),
    ([OUT, OUT.half()], [LSE, LSE], r"outs\[1\] is Half; it must be Float, like outs\[0\]"),
    ([OUT, OUT[..., :8]], [LSE, LSE], r"outs\[1\] has shape \[2, 1, 4, 8\]; its dimension 3 must be 16"),
    ([OUT], [LSE.double()], r"lses\[0\] is Double; it must be Float"),
    ([OUT], [LSE.transpose(1, 2)], r"lses\[0\] has shape \[2, 1, 4\]; its dimension 1 must be 4"),
]


@pytest.mark.parametrize(("outs", "lses", "message"), BAD_MERGES)
def test_merge_states(outs: list, lses: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"merge_states: {message}"):
        lean_attention.merge_states(outs, lses)
