"""The example, the page's code and the benchmark."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import distributed as benchmark
from tests.distributed.ranks import run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text()


def run_code(rank: int, code: str) -> torch.Tensor:
    names: dict = {}
    exec(code, names)
    return names["out"]


def test_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    first, second = run(2, run_code, code)
    assert first.isfinite().all()
    assert torch.equal(first, second)


def test_the_table_is_what_the_model_prints(capsys: pytest.CaptureFixture) -> None:
    benchmark.main(["--model"])
    printed = capsys.readouterr().out
    assert "A model, not a measurement" in printed
    rows = re.findall(r"^\| (\d+) \| (.*) \| (.*) \| (.*) \| (.*) \|$", PAGE, flags=re.M)
    assert len(rows) == 3
    for ranks, *cells in rows:
        for i, cell in enumerate(cells):
            seconds, _ = benchmark.model(benchmark.MODELLED[1 + i // 2], int(ranks), benchmark.LINKS[i % 2])
            assert cell == f"{1e6 * seconds:,.0f}", f"{ranks} GPUs"


def test_the_example_runs() -> None:
    """Four processes generate what one does; the example compares them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*launch, str(ROOT / "examples" / "context_parallel.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    assert "in one process: the same tokens" in ended.stdout


@pytest.mark.slow
def test_the_benchmark_runs(capsys: pytest.CaptureFixture) -> None:
    benchmark.main(["--context", "512", "--ranks", "1", "2", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "1 x 512" in printed and "16 x 32" in printed
    assert re.search(r"2 x \d+ +gather, 2 parts", printed)
