"""The benchmark harness on a case that takes no time."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import cpu_decode, peers, report, small_calls
from benchmarks.harness import FORMAT, NOT_INSTALLED, Case, Inputs, Unavailable, run_study
from benchmarks.peers import Ggml, LeanAttention, OnnxRuntime, Sdpa, Vllm, ggml
from benchmarks.report import (
    bound_of,
    draw,
    print_engines,
    print_study,
    print_summary,
    print_tables,
    share_of_read,
    write_text,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("case", [
    Case(torch.float32, (300,), 4, 2, 64),
    Case(torch.bfloat16, (300, 20, 1), 4, 2, 64, "tokens_first", name="three"),
], ids=lambda case: case.id)  # fmt: skip
def test_contenders_agree_and_results_are_kept(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "new" / "study.json"
    contenders = [contender for contender in peers.ALL if contender.name != "flex"]
    study = run_study([case], contenders, output, seconds=0.001)
    assert json.loads(output.read_text()) == study
    results = study["cases"][case.id]["contenders"]
    for name, result in results.items():
        if "unavailable" not in result:
            assert result["max_abs_error_to_fp32"] < (0.3 if "fp8" in name else 0.02), name
            assert result["gb_per_second"] == pytest.approx(case.kv_bytes / result["seconds"] / 1e9)
            assert result["share_of_read"] > 0
    assert study["machine"]["threads"] == torch.get_num_threads()
    assert study["cases"][case.id]["in_cache_gb_per_second"] > 0
    assert study["cases"][case.id]["read_only_gb_per_second"] > 0

    console = Console(width=40, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_tables(study, console)
    printed = console.export_text()
    assert case.id in printed
    assert "…" not in printed
    for name in results:
        assert name == "lean_attention" or name in printed
    write_text(print_study, study, tmp_path / "study.txt")
    assert case.id in (tmp_path / "study.txt").read_text()
    draw(study, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_study_measures_only_what_is_missing(tmp_path: Path) -> None:
    output = tmp_path / "study.json"
    first, second = (Case(torch.float32, (n,), 2, 1, 64) for n in (64, 65))
    before = run_study([first], [LeanAttention()], output, seconds=0.001)
    after = run_study([first, second], [LeanAttention()], output, seconds=0.001, resume=True)
    assert after["cases"][first.id] == before["cases"][first.id]
    assert list(after["cases"]) == [first.id, second.id]


def test_a_study_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    output, case = tmp_path / "study.json", Case(torch.float32, (64,), 2, 1, 64)
    study = run_study([case], [LeanAttention()], output, seconds=0.001)
    study["machine"]["threads"] = 1000
    output.write_text(json.dumps(study))
    with pytest.raises(ValueError, match=r"was measured with threads 1000, .*start anew, without --resume"):
        run_study([case], [LeanAttention()], output, seconds=0.001, resume=True)


@pytest.mark.parametrize(
    ("peer", "module"), [(OnnxRuntime(), "onnxruntime"), (Vllm(), "vllm"), (Ggml(), None)],
    ids=lambda peer: getattr(peer, "name", ""),
)  # fmt: skip
def test_a_peer_that_is_not_installed_says_so(
    peer, module: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module is not None:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("LEAN_ATTENTION_GGML", str(tmp_path))
    ggml.library.cache_clear()
    case = Case(torch.float32, (64,), 2, 1, 64)
    with pytest.raises(Unavailable, match=re.escape(NOT_INSTALLED)):
        peer.prepare(case, Inputs.random(case))


def test_what_a_peer_computes_with_stands_below_the_table(tmp_path: Path) -> None:
    class Noted(Sdpa):
        name = "noted"

        def prepare(self, case: Case, inputs: Inputs):
            call = super().prepare(case, inputs)
            call.note = "with an abacus"
            return call

        def versions(self) -> dict[str, str]:
            return {"abacus": "2.0"}

    case = Case(torch.float32, (64,), 2, 1, 64)
    study = run_study([case], [LeanAttention(), Noted()], tmp_path / "study.json", seconds=0.001, clock="cpu")
    for show in (print_study, print_engines):
        write_text(show, study, tmp_path / "study.txt")
        text = (tmp_path / "study.txt").read_text()
        assert "- noted: with an abacus" in text
        assert "abacus 2.0" in text
        assert "CPU time: GB/s" in text
        assert case.id in text


def test_a_peer_that_fails_is_told_of_and_does_not_end_the_study(tmp_path: Path) -> None:
    class Broken:
        name = "broken"

        def prepare(self, case: Case, inputs: object):
            raise RuntimeError("no such kernel\nand more")

    case = Case(torch.float32, (64,), 2, 1, 64)
    study = run_study([case], [LeanAttention(), Broken()], tmp_path / "study.json", seconds=0.001)
    results = study["cases"][case.id]["contenders"]
    assert results["broken"] == {"unavailable": "RuntimeError: no such kernel"}
    assert "seconds" in results["lean_attention"]


def test_the_studies_list_their_cases_once() -> None:
    for cases in (cpu_decode.subset(), cpu_decode.full_grid(), cpu_decode.engines()):
        ids = [case.id for case in cases]
        assert len(ids) == len(set(ids))


def test_bad_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["--only", "no-such-case"], "matches no case"),
        (["--only", "("], "not a regular expression"),
        (["--contenders", "nobody"], "invalid choice: 'nobody'"),
        (["--threads", "0"], "--threads 0 is not positive"),
        (["--seconds", "-1"], "--seconds -1.0 is not positive"),
        (["--cpu-time"], "goes with --threads 1 only"),
        (["--full", "--engines"], "not allowed with argument"),
    ]:
        with pytest.raises(SystemExit) as ended:
            cpu_decode.main(arguments)
        assert ended.value.code, arguments
        assert message in f"{ended.value.code} {capsys.readouterr().err}"


def test_a_summary_says_what_the_cases_say_together() -> None:
    def case(ours: float, in_cache: float, theirs: float | None, megabytes: int = 64, **more: float) -> dict:
        peer = {"unavailable": "no kernel"} if theirs is None else {"gb_per_second": theirs}
        return more | {
            "kv_bytes": megabytes * 10**6,
            "read_gb_per_second": 40.0,
            "in_cache_gb_per_second": in_cache,
            "contenders": {"lean_attention": {"gb_per_second": ours}, "sdpa": peer},
        }

    study = {"cases": {
        "bf16-h32-kv8-d128-b1-n50000": case(36.0, 80.0, 2.0),
        "bf16-h8-kv8-d128-b1-n50000": case(32.0, 60.0, None, read_only_gb_per_second=35.5),
        "bf16-h24-kv8-d128-b1-n50000": case(28.0, 70.0, 4.0),
        "f16-h64-kv8-d128-b1-n50000-tokens_first": case(15.0, 20.0, 1.0),
        "f32-h8-kv8-d128-b1-n1024": case(20.0, 60.0, 16.0, megabytes=8),  # counts against peers only
    }}  # fmt: skip
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(study, console)
    text = console.export_text()
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    assert ["bf16, HND, 1 to 4", "3", "0.80", "0.70", "0.90", "0.70"] in rows
    assert ["f16, NHD, 5 to 8", "1", "0.38", "0.38", "0.75", "0.75"] in rows
    assert ["2 and more", "1", "0.90", "0.90"] in rows
    assert ["1.5 to 2", "2", "0.75", "0.70"] in rows
    assert ["0 to 1", "1", "0.38", "0.38"] in rows
    assert not any(row[0].startswith("f32, ") for row in rows)
    assert "1.25 to 18.0 times as fast as sdpa, least at f32-h8-kv8-d128-b1-n1024" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no study: JSONDecodeError"),
        ("[]", "is no study: TypeError"),
        ("{}", "is no study: KeyError: 'machine'"),
        ('{"machine": {"format": 1}}', f"has format 1; this version reads {FORMAT}"),
    ],
    ids=["json", "list", "keys", "format"],
)
def test_a_report_of_what_is_no_study(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        report.main([str(tmp_path / "file.json")])
    with pytest.raises(SystemExit, match="is no study: FileNotFoundError"):
        report.main([str(tmp_path / "missing.json")])


def test_a_written_study_is_printed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, case = tmp_path / "study.json", Case(torch.float32, (64,), 2, 1, 64)
    run_study([case], [LeanAttention()], output, seconds=0.001)
    report.main([str(output)])
    assert case.id in capsys.readouterr().out


def test_kept_results_are_text_and_few() -> None:
    kept = [path for path in (ROOT / "benchmarks" / "results").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".md", ".txt"}
    assert sum(path.stat().st_size for path in kept) <= 100_000


def test_what_bounds_a_case() -> None:
    case = {"kv_bytes": 100, "products": 400, "giga_products_per_second": 80.0, "read_gb_per_second": 30.0}
    assert bound_of(case) == (20.0, "compute")
    assert bound_of(case | {"read_gb_per_second": 10.0}) == (10.0, "read")


def test_shares_are_those_of_the_rounds_where_they_were_kept() -> None:
    contenders = {"a": {"gb_per_second": 24.0}, "b": {"gb_per_second": 24.0, "share_of_read": 0.7}, "c": {}}
    case = {"read_gb_per_second": 30.0, "contenders": contenders}
    assert [share_of_read(case, name) for name in "ab"] == [pytest.approx(0.8), 0.7]
    assert math.isnan(share_of_read(case, "c"))


def test_small_calls_report_what_they_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small_calls.json"
    small_calls.main(["--seconds", "0.02", "--output", str(output)])
    cases = json.loads(output.read_text())["cases"]
    assert len(cases) == len(small_calls.CASES)
    assert all(result["one_thread_us"] > 0 and result["sdpa_us"] > 0 for result in cases.values())
    assert "bfloat16, 4" in capsys.readouterr().out
    assert "bfloat16, 4" in output.with_suffix(".txt").read_text()
