"""The benchmark harness on a case that takes no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import cpu_decode
from benchmarks.harness import Case, draw, print_table, run_study
from benchmarks.peers import FixedSplit, LeanAttention, OnnxRuntime, Sdpa, SdpaFolded

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("case", [
    Case(torch.float32, (300,), 4, 2, 64),
    Case(torch.bfloat16, (300, 20, 1), 4, 2, 64, "tokens_first", name="three"),
], ids=lambda case: case.id)  # fmt: skip
def test_contenders_agree_and_results_are_kept(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "new" / "study.json"
    contenders = [LeanAttention(), Sdpa(), SdpaFolded(), FixedSplit(1), FixedSplit(4), OnnxRuntime()]
    study = run_study([case], contenders, output, seconds=0.001)
    assert json.loads(output.read_text()) == study
    results = study["cases"][case.id]["contenders"]
    for name, result in results.items():
        if "unavailable" not in result:
            assert result["max_abs_error_to_fp32"] < 0.02, name
            assert result["gb_per_second"] == pytest.approx(case.kv_bytes / result["seconds"] / 1e9)
    assert study["machine"]["threads"] == torch.get_num_threads()

    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(study, console)
    assert case.id in console.export_text()
    draw(study, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_study_measures_only_what_is_missing(tmp_path: Path) -> None:
    output = tmp_path / "study.json"
    first, second = (Case(torch.float32, (n,), 2, 1, 64) for n in (64, 65))
    before = run_study([first], [LeanAttention()], output, seconds=0.001)
    after = run_study([first, second], [LeanAttention()], output, seconds=0.001, resume=True)
    assert after["cases"][first.id] == before["cases"][first.id]
    assert list(after["cases"]) == [first.id, second.id]


def test_the_studies_list_their_cases_once() -> None:
    for cases in (cpu_decode.subset(), cpu_decode.full_grid()):
        ids = [case.id for case in cases]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no-such-case"], "matches no case"),
        (["--only", "("], "not a regular expression"),
        (["--contenders", "nobody"], "invalid choice: 'nobody'"),
        (["--threads", "0"], "--threads 0 is not positive"),
        (["--seconds", "-1"], "--seconds -1.0 is not positive"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_decode", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
