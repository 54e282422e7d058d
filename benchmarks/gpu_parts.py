"""What benchmarks.gpu_check runs, each in a process of its own, until time.monotonic() is `end`.

Nothing is imported here but the standard library: the package may not be built yet.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Keep = Callable[..., None]

# What the tests import beside torch and pytest.
TEST_PACKAGES = ("allpairspy", "hypothesis", "matplotlib", "psutil", "rich", "transformers")
# Largest error of an output, which is an average of standard normal values.
MAX_ERROR = 0.03
# Of the soak, and what it may take to compute a shape's definition.
SOAK_SECONDS, SHAPE_SECONDS = 40, 3


def build_module() -> ModuleType:
    """lean_attention/_build.py by itself: importing the package would build the core."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "lean_attention" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_kernels() -> int:
    """CUDA kernels of the core beside the sources."""
    if not (ROOT / "lean_attention" / "_C.so").exists():
        return 0
    code = "from lean_attention import _core; print(len(_core.cuda_kernels()))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return int(shown.stdout.strip() or 0)


def build(keep: Keep, end: float) -> None:
    """For the GPU at hand, in place, unless that was done before."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no CUDA GPU here")
    if kernels := built_kernels():
        keep(kernels=kernels, built="before")
        return
    major, minor = torch.cuda.get_device_capability()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"{major}.{minor}"
    chosen = {"LEAN_ATTENTION_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, **chosen},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        print(done.stdout[-6000:])
        sys.exit(f"gpu_check: building ended with {done.returncode}")
    kernels = built_kernels()
    keep(kernels=kernels, built=f"for {architectures}")
    if kernels == 0:
        sys.exit("gpu_check: the core was built, and has no CUDA kernels")


def machine() -> dict[str, str]:
    import torch

    def output_of(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        except OSError:
            return "unknown"
        return done.stdout.strip() or "unknown"

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "commit": output_of("git", "rev-parse", "HEAD"),
    }


def error_of(arguments: dict[str, Any], **options: int) -> float:
    """Largest error of decode's output, beside the definition in float64."""
    import lean_attention
    from lean_attention import reference

    out, _ = lean_attention.decode(**arguments, **options)
    want, _ = reference.decode(**{name: tensor.cpu() for name, tensor in arguments.items()})
    return (out.cpu().double() - want).abs().max().item()


def refuse(error: float, of: object) -> None:
    if not error < MAX_ERROR:
        raise AssertionError(f"{of} is off by {error}; it may be by {MAX_ERROR}")


def smoke(keep: Keep, end: float, device: str = "cuda") -> None:
    """One call of each kind."""
    from benchmarks.gpu_bandwidth import Case

    facts = machine()
    keep(**facts)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for case in (
        Case("contiguous", (3000, 20)),
        Case("tokens-first", (3000, 20), layout="tokens_first"),
        Case("pages", (3000, 20), 16, "tokens_first"),
        Case("e4m3", (3000, 20), e4m3=True),
    ):
        error = error_of(case.inputs(device))
        keep(case=case.name, error=error)
        refuse(error, case)


def launches(device: str = "cuda") -> None:
    """Three launches for compute-sanitizer: split sequences, pages with new tokens, 8-bit caches.

    Inputs are made on the CPU, so that hardly a kernel but ours is watched.
    """
    import torch

    import lean_attention
    from benchmarks.gpu_bandwidth import Case

    for case in (
        Case("split", (700, 20), heads=8, kv_heads=2),
        Case("pages", (300, 40), 16, "tokens_first", heads=8, kv_heads=2),
        Case("e4m3", (300, 40), e4m3=True, heads=8, kv_heads=2),
    ):
        arguments = {name: tensor.to(device) for name, tensor in case.inputs("cpu").items()}
        if case.page_size:
            new = torch.randn(2, 1, 2, 128, dtype=torch.bfloat16).to(device)
            places = {name: arguments[name] for name in ("k_cache", "v_cache", "block_table")}
            before = torch.tensor([299, 39], dtype=torch.int32).to(device)
            lean_attention.append_kv(k=new, v=new, seq_lens=before, **places)
        refuse(error_of(arguments, num_ctas=5), case)
    print("three launches gave what they should")


def soak(keep: Keep, end: float, device: str = "cuda", calls: int = 250) -> None:
    """Launches of random shapes, `calls` of each; the last of each is compared with the definition."""
    import torch

    import lean_attention

    choose, done, worst = random.Random(), 0, 0.0
    end = min(end, time.monotonic() + SOAK_SECONDS)
    while time.monotonic() < end - SHAPE_SECONDS:
        kv_heads, group = choose.randint(1, 4), choose.choice([1, 2, 3, 4, 7, 8, 16])
        head_dim, batch = choose.choice([64, 80, 96, 128, 192, 256]), choose.randint(1, 9)
        dtype = choose.choice([torch.float16, torch.bfloat16])
        lens = [choose.randint(0, 3000) for _ in range(batch)]
        q = torch.randn(batch, choose.randint(1, 4), kv_heads * group, head_dim, dtype=dtype, device=device)
        k, v = torch.randn(2, batch, 3000, kv_heads, head_dim, dtype=dtype, device=device)
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        arguments = {"q": q, "k_cache": k, "v_cache": v, "seq_lens": seq_lens}
        for _ in range(calls - 1):
            lean_attention.decode(**arguments, num_ctas=choose.choice([0, 0, 1, 7, 300]))
        error = error_of(arguments, num_ctas=choose.choice([0, 0, 1, 7, 300]))
        refuse(error, f"{dtype}, q {list(q.shape)}, caches {list(k.shape)}, lengths {lens}")
        done, worst = done + calls, max(worst, error)
        keep(launches=done, worst_error=worst)
    print(f"{done} launches, the worst error {worst:.4f}")


def missing_packages() -> list[str]:
    """Of those that the tests import."""
    return [name for name in TEST_PACKAGES if importlib.util.find_spec(name) is None]


def tests_command(junit: Path) -> list[str]:
    """What pytest is called with; in some processes, whose references the CPU computes, where it can be."""
    parallel = []
    if importlib.util.find_spec("xdist") is not None:
        parallel = ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    options = ["-q", "-m", "gpu", "--continue-on-collection-errors", f"--junitxml={junit}", *parallel]
    return [sys.executable, "-m", "pytest", *options, "tests"]


def tests(keep: Keep, end: float, junit: Path) -> None:
    """Becomes pytest, so that a signal to stop reaches it and its results are written."""
    junit.unlink(missing_ok=True)  # of an earlier run
    missing = missing_packages()
    keep(missing_packages=missing)
    if missing:
        print(f"not installed: {', '.join(missing)}; tests that need them are left out")
    sys.stdout.flush()
    command = tests_command(junit)
    os.execv(command[0], command)
