"""Cases as data, hostile inputs for them, and the one comparison that all tests use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lean_attention import reference


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    head_dim_v: int = 0  # 0: head_dim
    q_len: int = 1
    causal: bool = True
    window_left: int = -1
    window_right: int = -1
    scale: float | None = None

    def options(self) -> dict:
        return {
            "scale": self.scale,
            "causal": self.causal,
            "window_left": self.window_left,
            "window_right": self.window_right,
        }

    def __str__(self) -> str:
        parts = [
            str(self.dtype).removeprefix("torch."),
            f"g{self.heads // self.kv_heads}",
            f"kv{self.kv_heads}",
            f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v else ""),
            f"q{self.q_len}",
            "n" + "_".join(map(str, self.lens)) if len(self.lens) < 7 else f"b{len(self.lens)}",
        ]
        if not self.causal:
            parts.append("full")
        if self.window_left >= 0 or self.window_right >= 0:
            parts.append(f"w{self.window_left}_{self.window_right}")
        if self.scale is not None:
            parts.append(f"s{self.scale}")
        return "-".join(parts)


def make_inputs(case: Case, layout: str = "tokens_first") -> dict[str, Tensor]:
    """Fresh random inputs. What lies beyond a sequence's length is NaN; lengths never fill the cache."""
    batch, max_len = len(case.lens), max(case.lens) + 37
    caches = []
    for dim in (case.head_dim, case.head_dim_v or case.head_dim):
        cache = torch.randn(batch, max_len, case.kv_heads, dim, dtype=case.dtype)
        if layout == "heads_first":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        for b, length in enumerate(case.lens):
            cache[b, length:] = torch.nan
        caches.append(cache)
    return {
        "q": torch.randn(batch, case.q_len, case.heads, case.head_dim, dtype=case.dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "seq_lens": torch.tensor(case.lens, dtype=torch.int32),
    }


def plain_decode(inputs: dict[str, Tensor], dtype: torch.dtype, **options) -> Tensor:
    """The same sum, written plainly in one dtype: what a user of PyTorch would get without a kernel."""
    q, k_cache, v_cache = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    q_len, num_heads, head_dim = q.shape[1:]
    group = num_heads // k_cache.shape[2]
    out = q.new_zeros(*q.shape[:3], v_cache.shape[3])
    for b in range(q.shape[0]):
        seq_len = k_cache.shape[1] if inputs["seq_lens"] is None else int(inputs["seq_lens"][b])
        keys = k_cache[b, :seq_len].repeat_interleave(group, dim=1).to(dtype)
        values = v_cache[b, :seq_len].repeat_interleave(group, dim=1).to(dtype)
        seen = torch.zeros(q_len, seq_len, dtype=torch.bool)
        for i in range(q_len):
            position = seq_len - q_len + i
            right = 0 if options["causal"] else options["window_right"]
            first = 0 if options["window_left"] < 0 else max(0, position - options["window_left"])
            last = seq_len - 1 if right < 0 else position + right
            seen[i, first : max(0, last + 1)] = True
        scale = head_dim**-0.5 if options["scale"] is None else options["scale"]
        scores = torch.einsum("qhd,thd->hqt", q[b].to(dtype), keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        out[b] = torch.einsum("hqt,thd->qhd", weights, values)
    return out


def assert_close(case: Case, inputs: dict[str, Tensor], out: Tensor, lse: Tensor) -> None:
    """At most twice the error of the plain sum in the same dtype, against float64."""
    options = case.options()
    want, want_lse = reference.decode(**inputs, **options)
    assert out.shape == want.shape, f"{case}: out has shape {out.shape}, the reference {want.shape}"
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert out.isfinite().all(), f"{case}: {(~out.isfinite()).sum()} elements are not finite"
    error = (out.double() - want).abs()
    plain = (plain_decode(inputs, case.dtype, **options).double() - want).abs().max()
    absolute = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}[case.dtype]
    limit = 2 * plain + absolute
    if error.numel() and not error.max() <= limit:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{case}: out{list(where)} is {out[where]}, the reference {want[where]:.6g}; error "
            f"{error.max():.3g} exceeds {limit:.3g} (plain {case.dtype}: {plain:.3g})"
        )
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf), f"{case}: rows that see nothing"
    finite = want_lse.isfinite()
    lse_error = (lse.double() - want_lse)[finite].abs()
    lse_limit = 2e-6 * (1 + want_lse[finite].abs())
    assert (lse_error <= lse_limit).all(), f"{case}: lse is off by {lse_error.max():.3g}"
