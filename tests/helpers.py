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


def assert_close(case: Case, inputs: dict[str, Tensor], out: Tensor, lse: Tensor) -> None:
    assert_same(str(case), {**inputs, **case.options()}, out, lse)


def assert_same(name: str, arguments: dict, out: Tensor, lse: Tensor) -> None:
    """At most twice the error of the plain sum in the same dtype, against float64."""
    arguments = {key: value for key, value in arguments.items() if key != "num_ctas"}
    dtype = arguments["q"].dtype
    want, want_lse = reference.decode(**arguments)
    assert out.shape == want.shape, f"{name}: out has shape {out.shape}, the reference {want.shape}"
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.isfinite().all(), f"{name}: {(~out.isfinite()).sum()} elements are not finite"
    error = (out.double() - want).abs()
    # What a user of PyTorch would get without a kernel: the same sum, written plainly in one dtype.
    plain_out, _ = reference.decode(**arguments, dtype=dtype)
    plain = (plain_out.double() - want).abs().max()
    absolute = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
    limit = 2 * plain + absolute
    if error.numel() and not error.max() <= limit:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: out{list(where)} is {out[where]}, the reference {want[where]:.6g}; error "
            f"{error.max():.3g} exceeds {limit:.3g} (plain {dtype}: {plain:.3g})"
        )
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf), f"{name}: rows that see nothing"
    finite = want_lse.isfinite()
    lse_error = (lse.double() - want_lse)[finite].abs()
    lse_limit = 2e-6 * (1 + want_lse[finite].abs())
    assert (lse_error <= lse_limit).all(), f"{name}: lse is off by {lse_error.max():.3g}"
