"""What an installed package must do: run by `make wheel-check` in fresh environments, outside the checkout.

It prints a line a check, and raises where one fails.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

begin = time.perf_counter()
import lean_attention  # noqa: E402

print(f"import, torch loaded before: {1000 * (time.perf_counter() - begin):.0f} ms")

from lean_attention import reference  # noqa: E402
from lean_attention.tools.picture import draw_schedules  # noqa: E402

assert Path(lean_attention.__file__).is_relative_to(sys.prefix), lean_attention.__file__


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two sequences in pages."""
    return {
        "q": torch.randn(2, 1, 8, 64, dtype=dtype),
        "k_cache": torch.randn(12, 16, 2, 64, dtype=dtype),
        "v_cache": torch.randn(12, 16, 2, 64, dtype=dtype),
        "seq_lens": torch.tensor([77, 13], dtype=torch.int32),
        "block_table": torch.tensor([[4, 1, 9, 0, 7], [3, 0, 0, 0, 0]], dtype=torch.int32),
    }


worst = 0.0
for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
    given = inputs(dtype)
    out, lse = lean_attention.decode(**given)
    want_out, want_lse = reference.decode(**given)
    error = max((out.double() - want_out).abs().max().item(), (lse.double() - want_lse).abs().max().item())
    assert error <= bound, (dtype, error)
    worst = max(worst, error / bound)
print(f"decode against the reference: at most {worst:.2f} of what is allowed")

torch.library.opcheck(torch.ops.lean_attn.decode.default, tuple(inputs(torch.float32).values()))
print("opcheck: passed")

try:
    lean_attention.decode(**{**inputs(torch.float32), "q": torch.randn(2, 1, 8, 72)})
    raise AssertionError("a q of another head_dim is taken")
except ValueError as error:
    print(f"an error: {error}")

schedule = lean_attention.Schedule([300, 0, 1000], num_kv_heads=1, num_ctas=3)
assert str(schedule).startswith("12 LeanTiles of 128 tokens over 3 CTAs\nCTA 0: sequence 0, KV head 0,")
draw_schedules(schedule, Path("schedule.png"))
print(f"picture of the schedule: {Path('schedule.png').stat().st_size} bytes")

info = subprocess.run(
    [sys.executable, "-m", "lean_attention", "info"], check=True, capture_output=True, text=True
).stdout
for line in info.splitlines():
    if line.split(" ")[0] in ("torch", "python", "backends", "in"):
        print(f"info: {' '.join(line.split())}")
