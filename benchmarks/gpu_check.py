"""Everything that only a GPU can tell, in one command of some minutes: `python -m benchmarks.gpu_check`.

Runs the GPU tests, a set of them under compute-sanitizer, a soak of launches of random shapes, and a table of
KV bytes per second beside the measured read bandwidth; writes what it saw to one JSON file with GPU, driver,
torch and commit. Needs a package that was built with CUDA (`python -m lean_attention info`).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import lean_attention
from benchmarks.harness import OUTPUTS
from lean_attention import reference
from lean_attention._core import core

RESULTS = OUTPUTS / "gpu_check.json"


def run(command: list[str], seconds: int) -> dict:
    """The command's exit status and the end of what it said."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"command": " ".join(command), "ended": f"not within {seconds} s"}
    tail = (result.stdout + result.stderr).splitlines()[-6:]
    print("\n".join(tail), flush=True)
    return {"command": " ".join(command), "ended": result.returncode, "tail": tail}


def soak(launches: int, seconds: float) -> dict:
    """Launches of random shapes; the last of each shape is compared with float64."""
    choose, done, start = random.Random(), 0, time.monotonic()
    worst = 0.0
    while done < launches and time.monotonic() - start < seconds:
        kv_heads, group = choose.randint(1, 4), choose.choice([1, 2, 3, 4, 7, 8, 16])
        head_dim, batch = choose.choice([64, 80, 96, 128, 192, 256]), choose.randint(1, 9)
        dtype = choose.choice([torch.float16, torch.bfloat16])
        lens = torch.tensor([choose.randint(0, 3000) for _ in range(batch)], dtype=torch.int32)
        q = torch.randn(batch, choose.randint(1, 4), kv_heads * group, head_dim, dtype=dtype, device="cuda")
        k, v = torch.randn(2, batch, 3000, kv_heads, head_dim, dtype=dtype, device="cuda")
        seq_lens = lens.cuda()
        for _ in range(250):
            out, _ = lean_attention.decode(q, k, v, seq_lens, num_ctas=choose.choice([0, 0, 1, 7, 300]))
        done += 250
        want, _ = reference.decode(q.cpu(), k.cpu(), v.cpu(), lens)
        error = (out.cpu().double() - want).abs().max().item()
        if not error < 0.03:
            raise AssertionError(f"soak: error {error} for {q.shape}, {k.shape}, {lens.tolist()}")
        worst = max(worst, error)
    return {"launches": done, "worst_error": worst, "seconds": round(time.monotonic() - start, 1)}


def microseconds(function, repeats: int = 30) -> float:
    """Median GPU time of a call."""
    for _ in range(5):
        function()
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) * 1e3 for begin, end in events)[repeats // 2]


def bandwidth() -> dict:
    data = torch.empty(2**31, dtype=torch.float32, device="cuda")  # 8 GB
    read = data.nbytes / microseconds(data.sum, 10) / 1e3
    rows = []
    for batch, kv_heads, group, head_dim, tokens in (
        (1, 8, 4, 128, 8192),
        (1, 8, 4, 128, 65536),
        (1, 8, 4, 128, 524288),
        (16, 8, 8, 128, 8192),
        (64, 8, 1, 128, 4096),
        (16, 8, 4, 64, 16384),
        (16, 4, 4, 256, 8192),
        (1, 8, 4, 128, 1024),
    ):
        q = torch.randn(batch, 1, kv_heads * group, head_dim, dtype=torch.bfloat16, device="cuda")
        k, v = torch.randn(
            2, batch, kv_heads, tokens, head_dim, dtype=torch.bfloat16, device="cuda"
        ).transpose(2, 3)
        lens = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")

        def call(q=q, k=k, v=v, lens=lens) -> None:
            lean_attention.decode(q, k, v, lens)

        taken = microseconds(call)
        speed = 2 * k.nbytes / taken / 1e3
        rows.append(
            {
                "batch": batch,
                "kv_heads": kv_heads,
                "group": group,
                "head_dim": head_dim,
                "tokens": tokens,
                "microseconds": round(taken, 1),
                "GB/s": round(speed),
                "share_of_read_bandwidth": round(speed / read, 3),
            }
        )
        print(rows[-1], flush=True)
    return {"read_GB/s": round(read), "decode_bf16": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--soak", type=int, default=100_000, help="launches (at most 100 s of them)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no CUDA GPU here")
    if not core.cuda_kernels():
        sys.exit(
            "gpu_check: this build of lean_attention has no CUDA kernels; install with LEAN_ATTENTION_CUDA=1"
        )
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    seen = {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
    }

    def keep(**more) -> None:
        seen.update(more)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(seen, indent=2) + "\n")

    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    keep(tests=run(pytest, 180))
    keep(bandwidth=bandwidth())
    keep(soak=soak(arguments.soak, 100))
    sanitizer = shutil.which("compute-sanitizer")
    few = [*pytest, "-k", "every_grid or strides"]
    for tool in ("memcheck", "racecheck", "initcheck"):
        told = (
            run([sanitizer, "--tool", tool, *few], 70) if sanitizer else "compute-sanitizer is not installed"
        )
        keep(**{tool: told})
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
