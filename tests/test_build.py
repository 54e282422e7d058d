"""The package builds just in time where there is no binary, and says what is wrong where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lean_attention import _build
from lean_attention._core import core
from tests import checkout

GPUS = {
    "none": "",
    "one": "9.0\n",
    "two of a kind": "9.0\n9.0\n",
    "old": "7.5\n",
    "mixed": "12.0\n8.6\n7.0\n",
}


def python(code: str, package_root: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code that imports the package from `package_root`, whatever else is installed."""
    # An editable install finds its binary for any copy of the package.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
    return subprocess.run(
        [sys.executable, "-c", alone + code],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=package_root,
        env={**os.environ, "PYTHONPATH": str(package_root), **environment},
    )


@pytest.mark.slow
def test_builds_just_in_time_from_sources(tmp_path: Path) -> None:
    checkout.copy(tmp_path, "lean_attention", "csrc")
    code = (
        "import torch, lean_attention as la; print(la.__file__); "
        "q = torch.randn(1, 1, 2, 8); k = torch.randn(1, 5, 1, 8); print(la.decode(q, k, k)[0].shape)"
    )
    result = python(code, tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "torch.Size([1, 1, 2, 8])" in result.stdout
    assert "building the compiled core" in result.stderr
    again = python(code, tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert again.returncode == 0, again.stderr


def test_no_two_sources_have_one_name() -> None:
    """torch's just-in-time build names an object after its source, without the folder."""
    names = [Path(source).name for source in _build.sources()]
    assert len(set(names)) == len(names), names


def test_a_package_without_binary_and_sources_says_so(tmp_path: Path) -> None:
    checkout.copy(tmp_path, "lean_attention")
    result = python("import lean_attention", tmp_path)
    assert result.returncode != 0
    assert "the compiled core lean_attention._C is missing" in result.stderr


def test_a_stale_lock_is_named(tmp_path: Path) -> None:
    checkout.copy(tmp_path, "lean_attention", "csrc")
    lock = tmp_path / "cache" / "lean_attention_C" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    result = python("import lean_attention", tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert result.returncode != 0
    assert str(lock) in result.stderr


def test_the_binary_runs_with_any_torch_from_its_target_on() -> None:
    """No symbol of torch beyond the stable C shim."""
    symbols = subprocess.run(["nm", "-D", "--undefined-only", core.__file__], capture_output=True, text=True)
    if symbols.returncode != 0:
        pytest.skip("nm is not available")
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert [name for name in names if "at4" in name or "c104" in name or "c103" in name] == []
    assert any(name.startswith("aoti_torch_") for name in names)


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: str, toolkit: bool, **environment) -> Path:
    """One that shows these GPUs, has a toolkit or not, and these variables. Returns the toolkit's place."""
    for name in ("CUDA_HOME", "CUDA_PATH", "LEAN_ATTENTION_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    home, programs = tmp_path / "cuda", tmp_path / "programs"
    for file in (home / "bin" / "nvcc", home / "lib64" / "libcudart_static.a", programs / "nvidia-smi"):
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{GPUS[gpus]}'\n")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(_build, "cuda_places", lambda: [home] if toolkit else [tmp_path / "nothing"])
    return home


ALL = _build.CUDA_ARCHITECTURES


@pytest.mark.parametrize(
    ("environment", "gpus", "want"),
    [
        # A user's build: all, whatever there is.
        ({}, "none", ALL),
        ({}, "one", ALL),
        ({"LEAN_ATTENTION_CUDA": "0"}, "one", None),
        ({"LEAN_ATTENTION_CUDA": "1"}, "none", ALL),
        ({"TORCH_CUDA_ARCH_LIST": "8.9"}, "none", "8.9"),
        ({"LEAN_ATTENTION_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "8.9"}, "one", None),
        # The Makefile's: what can run here, or what is asked for.
        ({"LEAN_ATTENTION_CUDA": "visible"}, "none", None),
        ({"LEAN_ATTENTION_CUDA": "visible"}, "one", "9.0"),
        ({"LEAN_ATTENTION_CUDA": "visible"}, "two of a kind", "9.0"),
        ({"LEAN_ATTENTION_CUDA": "visible"}, "old", None),
        ({"LEAN_ATTENTION_CUDA": "visible"}, "mixed", "8.6;12.0"),
        ({"LEAN_ATTENTION_CUDA": "visible", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}, "none", "8.0;9.0"),
    ],
    ids=[
        "user", "user-with-a-gpu", "off", "on", "listed", "off-though-listed",
        "visible-none", "visible-one", "visible-two", "visible-old", "visible-mixed", "visible-listed",
    ],
)  # fmt: skip
def test_what_is_built_for_which_gpus(
    environment, gpus: str, want: str | None, monkeypatch, tmp_path
) -> None:
    home = machine(monkeypatch, tmp_path, gpus, True, **environment)
    assert _build.cuda_build() == (None if want is None else (home, want))


def test_what_is_built_without_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, "one", False)
    assert _build.cuda_build() is None
    monkeypatch.setenv("LEAN_ATTENTION_CUDA", "visible")
    assert _build.cuda_build() is None
    monkeypatch.setenv("LEAN_ATTENTION_CUDA", "1")
    with pytest.raises(
        RuntimeError, match=r"LEAN_ATTENTION_CUDA is 1, and no CUDA toolkit .* is in any of .*nothing"
    ):
        _build.cuda_build()
    monkeypatch.setenv("LEAN_ATTENTION_CUDA", "yes")
    with pytest.raises(ValueError, match="LEAN_ATTENTION_CUDA is 'yes'; it must be 0, 1 or visible"):
        _build.cuda_build()


def test_every_gpu_finds_code_that_it_can_run() -> None:
    """CUDA C++ programming guide, on compatibility: machine code runs on chips of its major version and no
    lesser minor one, PTX is compiled for any chip that is not older."""
    gpus = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]
    for major, minor in gpus:
        found = []
        for of_major, of_minor, ptx in re.findall(r"(\d+)\.(\d+)(\+PTX)?(?:;|$)", _build.CUDA_ARCHITECTURES):
            code = int(of_major), int(of_minor)
            found += [code] if code[0] == major and code[1] <= minor else []
            found += [code] if ptx and code <= (major, minor) else []
        assert found, (major, minor)


def test_no_code_is_for_one_chip_alone() -> None:
    assert re.fullmatch(r"(\d+\.\d+(\+PTX)?;?)+", _build.CUDA_ARCHITECTURES)


def test_the_constraints_admit_what_the_package_asks_for() -> None:
    """Every package that it asks for is pinned, once for every Python, in a version that it admits."""
    text = (checkout.ROOT / "third_party" / "constraints.txt").read_text()
    pins = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins)
    for python in ("3.10", "3.11", "3.12", "3.13"):
        here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        names = [canonicalize_name(pin.name) for pin in here]
        assert len(set(names)) == len(names)
        versions = {
            name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, here, strict=True)
        }
        for needed in map(Requirement, requires("lean_attention")):
            assert versions[canonicalize_name(needed.name)] in needed.specifier, (needed, python)
