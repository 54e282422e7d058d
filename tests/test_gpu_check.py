"""What of benchmarks.gpu_check shows without a GPU: its plan, how its parts end, and what they compute."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lean_attention
from benchmarks import gpu_bandwidth, gpu_check, gpu_model, gpu_parts
from benchmarks.gpu_bandwidth import CASES, Unavailable, line_of, result_of
from benchmarks.gpu_check import Part, Results, plan, run_parts


def test_the_plan_fits_its_time_and_every_command_can_be_formed(tmp_path: Path, capsys) -> None:
    gpu_check.main(["--dry-run", "--output", str(tmp_path)])
    *lines, total = capsys.readouterr().out.splitlines()
    assert int(total.removesuffix(" s in all")) <= 420
    commands = [shlex.split(line.removesuffix("  (not installed here)")) for line in lines if line[0] == " "]
    assert len(commands) == sum(len(part.commands) for part in plan(tmp_path))
    parts = [command[command.index("--part") + 1] for command in commands]
    assert parts == ["build", "smoke", "bandwidth", "soak", "tests", *["launches"] * 3]
    assert all(command[-1] == str(tmp_path) for command in commands[:5])
    for command, tool in zip(commands[5:], ("memcheck", "racecheck", "synccheck"), strict=True):
        assert Path(command[0]).name == "compute-sanitizer"
        assert command[1:5] == ["--tool", tool, "--error-exitcode", "1"]
    assert list(tmp_path.iterdir()) == []


def test_the_results_go_where_out_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu_check.main(["--dry-run"])
    assert f"{tmp_path}/smoke.json" in capsys.readouterr().out
    monkeypatch.delenv("OUT")
    gpu_check.main(["--dry-run"])
    assert "/build/gpu_check/smoke.json" in capsys.readouterr().out


def test_bad_command_lines(capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--part", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def part(name: str, seconds: int, code: str, **more) -> Part:
    return Part(name, seconds, ((sys.executable, "-c", code),), **more)


def test_a_part_that_fails_or_hangs_takes_nothing_from_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    hang = (
        "from pathlib import Path; import subprocess, sys, time; "
        "from benchmarks.gpu_check import Results; "
        f"Results(Path({str(tmp_path / 'hangs.json')!r})).keep(launches=250); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    ended = run_parts(
        [
            part("fails", 1, "print('so far'); raise SystemExit(3)"),
            part("hangs", 4, hang),
            Part("missing", 1, (("/no/such/program",),)),
            part("works", 5, "import os; print(os.environ['SAID'])", environment=(("SAID", "hello"),)),
        ],
        tmp_path,
    )
    kept = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ended}
    assert ended["fails"] == "3" and ended["works"] == "passed"
    assert ended["hangs"].startswith("not within ")
    assert ended["missing"].startswith("did not start: ")
    assert kept["fails"]["runs"][0]["tail"] == ["so far"]
    assert kept["works"]["runs"][0]["tail"] == ["hello"]
    assert kept["hangs"]["rows"] == [{"launches": 250}], "lost what it had kept"
    [child] = [int(line.split()[1]) for line in kept["hangs"]["runs"][0]["tail"] if line.startswith("child")]
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    assert "so far\n" in capsys.readouterr().out


def test_nothing_runs_that_a_failed_build_leaves_out(tmp_path: Path) -> None:
    ended = run_parts(
        [part("build", 5, "raise SystemExit('no compiler')", needed=True), part("smoke", 5, "")], tmp_path
    )
    assert ended == {"build": "1", "smoke": "left out, for build failed"}
    assert not (tmp_path / "smoke.json").exists()


def test_time_that_a_part_leaves_goes_to_the_next(tmp_path: Path, capsys) -> None:
    run_parts([part("first", 100, ""), part("second", 20, "")], tmp_path)
    limits = [line for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    assert limits[0] == "== first: 100 s at most"
    assert 115 <= int(limits[1].split()[2]) <= 120


def test_tests_are_run_and_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called = []
    monkeypatch.setattr(gpu_parts.os, "execv", lambda program, command: called.append(command))
    monkeypatch.setattr(gpu_parts, "TEST_PACKAGES", ("json", "no_such_package"))
    results = Results(tmp_path / "tests.json")
    gpu_parts.tests(results.keep, 0.0, tmp_path / "tests.xml")
    assert json.loads(results.path.read_text())["rows"] == [{"missing_packages": ["no_such_package"]}]
    [command] = called
    assert command[1:3] == ["-m", "pytest"] and f"--junitxml={tmp_path / 'tests.xml'}" in command
    assert command[command.index("-m", 3) + 1] == "gpu"


def test_what_smoke_launches_and_soak_compute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU, whose decode does the same."""
    results = Results(tmp_path / "rows.json")
    gpu_parts.smoke(results.keep, 0.0, device="cpu")
    assert len(results.content["rows"]) == 1 + 4
    gpu_parts.launches(device="cpu")
    monkeypatch.setattr(gpu_parts, "SHAPE_SECONDS", 0)
    gpu_parts.soak(results.keep, time.monotonic() + 0.01, device="cpu", calls=2)
    assert results.content["rows"][-1]["launches"] >= 2
    monkeypatch.setattr(gpu_parts, "MAX_ERROR", 1e-9)
    with pytest.raises(AssertionError, match="is off by"):
        gpu_parts.launches(device="cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs_of_the_bandwidth_cases(case: gpu_bandwidth.Case) -> None:
    """decode takes them and reads as many tokens as kv_bytes counts; here with a hundredth of the tokens."""
    assert case.kv_bytes == sum(case.lens) * 8 * 128 * 2 * (1 if case.e4m3 else 2)
    small = dataclasses.replace(case, lens=tuple(length // 100 for length in case.lens))
    inputs = small.inputs("cpu")
    assert gpu_parts.error_of(inputs) < gpu_parts.MAX_ERROR
    assert ("block_table" in inputs) is (case.page_size > 0)
    heads_first = inputs["k_cache"].stride(2) > inputs["k_cache"].stride(1)
    assert heads_first is (case.layout == "heads_first")


def test_the_model_knows_cases_by_their_names() -> None:
    assert {case.name for case in gpu_model.CASES} <= {case.name for case in CASES}
    assert 0 < gpu_model.predicted_share("1 x 8k") < 1
    assert gpu_model.predicted_share("no such case") is None


def test_a_row_has_the_prediction_beside_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"microseconds": 20.0, "gb_per_second": 2000.0, "host_microseconds": 9.0}
    monkeypatch.setattr(gpu_bandwidth, "measure", lambda case, prepare: measured)
    row = result_of("lean_attention", gpu_bandwidth.ours, CASES[0], 4000.0, time.monotonic() + 60)
    assert (row["share_of_read"], row["predicted_share"]) == (0.5, gpu_model.predicted_share("1 x 8k"))
    predicted = f"{gpu_model.predicted_share('1 x 8k'):.2f}"
    assert line_of(row).split() == [
        "lean_attention",
        "1",
        "x",
        "8k",
        "20.0",
        "2000",
        "0.50",
        predicted,
        "9.0",
    ]


def test_cases_that_are_not_measured_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(case, prepare):
        raise Unavailable("takes no pages")

    def breaks(case, prepare):
        raise RuntimeError("out of memory")

    later = time.monotonic() + 60
    for measure, end, key, why in [
        (refuses, later, "left_out", "takes no pages"),
        (breaks, later, "failed", "RuntimeError: out of memory"),
        (breaks, time.monotonic(), "left_out", "no time was left"),
    ]:
        monkeypatch.setattr(gpu_bandwidth, "measure", measure)
        assert result_of("peer", gpu_bandwidth.ours, CASES[0], 4000.0, end)[key] == why


class Wrapper:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper, as far as the benchmark goes: on our decode."""

    def __init__(self, workspace: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
        self.layout = layout

    def plan(
        self, offsets, indices, last, heads, kv_heads, head_dim, page_size, *, q_data_type, kv_data_type
    ):
        assert offsets.dtype == indices.dtype == last.dtype == torch.int32
        counts = offsets.diff()
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for b, count in enumerate(counts):
            table[b, :count] = indices[offsets[b] : offsets[b + 1]]
        self.arguments = {"block_table": table, "seq_lens": ((counts - 1) * page_size + last).int()}
        self.shape = (heads, kv_heads, head_dim, page_size, q_data_type, kv_data_type)

    def run(self, q, caches):
        k, v = caches if self.layout == "NHD" else (cache.transpose(1, 2) for cache in caches)
        assert self.shape == (*q.shape[1:2], k.shape[2], k.shape[3], k.shape[1], q.dtype, k.dtype)
        return lean_attention.decode(q[:, None], k, v, **self.arguments)[0][:, 0]


def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens):
    return lean_attention.decode(q, k_cache, v_cache, cache_seqlens)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peers_are_given_what_we_are_given(case, monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer, flash_attn = ModuleType("flashinfer"), ModuleType("flash_attn")
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    flash_attn.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    small = dataclasses.replace(case, lens=tuple(length // 100 for length in case.lens))
    inputs = small.inputs("cpu")
    want = gpu_bandwidth.ours(small, inputs)()[0]
    torch.testing.assert_close(gpu_bandwidth.flashinfer(small, inputs)(), want[:, 0], atol=0.01, rtol=0.02)
    if case.page_size or case.e4m3:
        with pytest.raises(Unavailable, match="is measured with bf16 caches without pages"):
            gpu_bandwidth.flash_attention(small, inputs)
    else:
        assert torch.equal(gpu_bandwidth.flash_attention(small, inputs)(), want)


def test_peers_that_are_not_installed_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, prepare in (
        ("flash_attn", gpu_bandwidth.flash_attention),
        ("flashinfer", gpu_bandwidth.flashinfer),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(Unavailable, match="not importable"):
            prepare(CASES[0], {})
