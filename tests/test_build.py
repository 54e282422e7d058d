"""The package builds just in time where there is no binary, and says what is wrong where it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lean_attention import _build, _core
from lean_attention._core import library
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
    """Beside a binary too; with CUDA, where there is a toolkit, as for a visible GPU of the architecture."""
    checkout.copy(tmp_path, "lean_attention", "csrc")
    (tmp_path / "lean_attention" / "_C.so").write_text("no binary")
    # One kernel for each dtype instead of sixteen, each of which takes nvcc some seconds.
    (tmp_path / "csrc" / "cuda" / "decode" / "kernel_list.h").write_text("LEAN_DECODE_KERNEL(64, 64, 1, 2)\n")
    code = (
        "import torch, lean_attention as la; from lean_attention import _core; "
        "from lean_attention.tools.info import describe; print(la.__file__, describe()); "
        "q = torch.randn(1, 1, 2, 8); k = torch.randn(1, 5, 1, 8); print(la.decode(q, k, k)[0].shape); "
        "print(len(_core.cuda_kernels()))"
    )
    with_cuda = _build.cuda_toolkit() is not None
    environment = {
        **checkout.quick_build(tmp_path),
        "LEAN_ATTENTION_JIT": "1",
        "LEAN_ATTENTION_CUDA": "" if with_cuda else "0",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
    }
    targets = "the CPU and CUDA 9.0" if with_cuda else "the CPU only"
    result = python(code, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout and "torch.Size([1, 1, 2, 8])" in result.stdout
    assert result.stdout.splitlines()[-1] == ("2" if with_cuda else "0")
    assert ("cpu, cuda (2 kernels)" in result.stdout) == with_cuda
    assert f"building the compiled core for {targets} in " in result.stderr
    assert "ninja" not in result.stderr and "nvcc" not in result.stderr
    again = python(code, tmp_path, **environment)
    assert again.stdout == result.stdout and "building" not in again.stderr
    # A source that does not compile any more: tried again, and shown.
    (tmp_path / "csrc" / "bad_numbers.cpp").write_text("no C++\n")
    for _ in range(2):
        broken = python(code, tmp_path, **environment)
        assert broken.returncode != 0
        assert f"the compiled core could not be built for {targets}" in broken.stderr
        assert "bad_numbers.cpp:1:1: error: " in broken.stderr


def test_a_wrong_wish_for_a_build(tmp_path: Path) -> None:
    checkout.copy(tmp_path, "lean_attention")
    result = python("import lean_attention", tmp_path, LEAN_ATTENTION_JIT="yes")
    assert "ValueError: LEAN_ATTENTION_JIT is 'yes'; it must be 0 or 1" in result.stderr


def test_no_two_sources_have_one_name() -> None:
    """torch's just-in-time build names an object after its source, without the folder."""
    names = [Path(source).name for source in _build.sources()]
    assert len(set(names)) == len(names), names


def test_a_package_without_binary_and_sources_says_so(tmp_path: Path) -> None:
    checkout.copy(tmp_path, "lean_attention")
    result = python("import lean_attention", tmp_path)
    assert result.returncode != 0
    assert "the compiled library lean_attention/_C.so is missing" in result.stderr


def test_a_second_copy_in_one_process_is_refused(tmp_path: Path) -> None:
    """By one sentence, before torch says of each op that it is registered twice."""
    for name in ("first", "second"):
        checkout.copy(tmp_path / name, "lean_attention")
        shutil.copy(library, tmp_path / name / "lean_attention")
    code = (
        "import sys, lean_attention; "
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('lean_attention')]; "
        "sys.path.insert(0, '../second'); import lean_attention"
    )
    result = python(code, tmp_path / "first", PYTHONPATH="")
    assert result.returncode != 0
    ours, others = (tmp_path / name / "lean_attention" / "_C.so" for name in ("second", "first"))
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: lean_attention: this process has loaded {others} already, and {ours} has the same "
        "ops; a process can use one copy of the package: uninstall the other one, or take it off sys.path"
    )


def test_a_copy_that_another_hides_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "site" / "lean_attention" / "_C.so"
    binary.parent.mkdir(parents=True)
    binary.touch()
    monkeypatch.setattr(sys, "path", [str(checkout.ROOT), "", str(tmp_path), str(tmp_path / "site")])
    monkeypatch.chdir(checkout.ROOT)
    assert _build.other_copies() == [binary]


HOLD = """
import subprocess, sys, time
from pathlib import Path
from lean_attention import _build
with _build.locked(Path(sys.argv[1])) as lock:
    if float(sys.argv[2]):
        compiler = [sys.executable, "-c", "import time; time.sleep(" + sys.argv[2] + ")"]
        subprocess.Popen(compiler, pass_fds=[lock.fileno()], stdout=subprocess.DEVNULL)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("seconds", ["0", "1.5"], ids=["no-compiler", "its-compiler-goes-on"])
def test_a_builder_that_was_killed_leaves_no_lock(seconds: str, tmp_path: Path, caplog) -> None:
    """Nor does torch's own lock, which it left, stop anybody. But its compiler is waited for."""
    (tmp_path / "lock").touch()
    command = [sys.executable, "-c", HOLD, str(tmp_path), seconds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=checkout.ROOT) as builder:
        assert builder.stdout.readline() == "held\n"
        (tmp_path / "lock").touch()
        builder.kill()
        builder.wait()
        begin = time.monotonic()
        with _build.locked(tmp_path):
            waited = time.monotonic() - begin
    assert not (tmp_path / "lock").exists()
    assert (waited > 0.5) is (seconds != "0")
    said = f"lean_attention: waiting for another process that builds in {tmp_path}"
    assert (said in caplog.messages) is (seconds != "0")


def test_the_binary_runs_with_any_torch_from_its_target_on() -> None:
    """No symbol of torch beyond the stable C shim."""
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True)
    if symbols.returncode != 0:
        pytest.skip("nm is not available")
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert [name for name in names if re.match("_?Py", name)] == [], "nor of Python"
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


@pytest.mark.slow
def test_the_source_distribution_has_the_checkout(tmp_path: Path) -> None:
    if not (checkout.ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=checkout.ROOT, check=True
    )
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=checkout.ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    here = {name for name in listed.stdout.splitlines() if (checkout.ROOT / name).exists()}
    assert here - packed == set()


def setup(torch: str, tmp_path: Path) -> str:
    """What setup.py ends with, where `import torch` does this."""
    (tmp_path / "torch.py").write_text(torch)
    command = [
        sys.executable,
        str(checkout.ROOT / "setup.py"),
        "--quiet",
        "egg_info",
        "--egg-base",
        str(tmp_path),
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # Without bytecode, which Python takes for that of another torch.py of the same second and length.
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode == 1
    return result.stderr


def test_a_build_without_what_it_needs(tmp_path: Path) -> None:
    says = "lean_attention: building needs torch 2.10 or newer, and this environment has "
    todo = "; install one first, or leave out --no-build-isolation\n"
    assert setup("raise ModuleNotFoundError", tmp_path) == f"{says}none{todo}"
    assert setup("__version__ = '2.9.1+cpu'", tmp_path) == f"{says}2.9.1+cpu{todo}"
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
    assert setup("", tmp_path) == f"{says}65.5.0{todo}".replace("torch 2.10", "setuptools 77")


def test_a_toolkit_that_does_not_take_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setenv("CC", "g++-99")
    nvcc.write_text("#!/bin/sh\nexit 0\n")
    nvcc.chmod(0o755)
    _build.refuse_compiler(_build.CudaBuild(tmp_path, "9.0"))
    says = "host_config.h:143:2: error: #error -- unsupported GNU version!"
    nvcc.write_text(f"#!/bin/sh\necho In file >&2\necho '{says}' >&2\nexit 1\n")
    with pytest.raises(RuntimeError) as raised:
        _build.refuse_compiler(_build.CudaBuild(tmp_path, "9.0"))
    assert str(raised.value) == (
        f"the CUDA toolkit in {tmp_path} does not take the C++ compiler g++-99 ({says}); "
        "name one that it takes by CC=, or leave the kernels out by LEAN_ATTENTION_CUDA=0"
    )


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            "/lib/libc.so.6: version `GLIBC_2.34' not found (required by _C.so)",
            r"it needs GLIBC_2\.34, and this system has glibc 2\.\d+; build it here: pip install ",
        ),
        ("_C.so: undefined symbol: torch_new", r"torch \S+ has no torch_new; it needs torch 2\.10 or newer$"),
        ("_C.so: file too short", r"_C\.so: file too short$"),
    ],
    ids=["old-glibc", "old-torch", "other"],
)
def test_a_library_that_does_not_load(error: str, says: str) -> None:
    assert re.match(
        rf"lean_attention: /x/_C\.so does not load: {says}", _core._why_not(Path("/x/_C.so"), error)
    )


def test_a_library_that_does_not_load_is_no_reason_to_build(tmp_path: Path) -> None:
    checkout.copy(tmp_path, "lean_attention")
    (tmp_path / "lean_attention" / "_C.so").write_text("no binary")
    result = python("import lean_attention", tmp_path)
    assert "ImportError: lean_attention: " in result.stderr.splitlines()[-1]
    assert result.stderr.rstrip().endswith("_C.so: file too short")


def code_for(gpu: tuple[int, int], architectures: str) -> str | None:
    """The entry of a list of architectures that a GPU of this compute capability runs; None: it has none.

    CUDA C++ programming guide, on compatibility: machine code runs on chips of its major version and no
    lesser minor one, PTX is compiled for any chip that is not older. Both that end in "a" are for one chip.
    """
    parsed = []
    for entry in architectures.split(";"):
        major, minor, only, ptx = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry).groups()
        parsed.append((entry, (int(major), int(minor)), bool(only), bool(ptx)))
    machine = [
        (code, entry)
        for entry, code, only, _ in parsed
        if code == gpu or (not only and code[0] == gpu[0] and code < gpu)
    ]
    compiled = [(code, entry) for entry, code, only, ptx in parsed if ptx and not only and code <= gpu]
    return max(machine or compiled, default=(None, None))[1]


def test_which_code_a_gpu_runs() -> None:
    """Where an entry ended in "a", the next chip of its kind had nothing to run."""
    before = "8.0;8.9;9.0a;10.0a;12.0+PTX"
    found = {
        gpu: code_for(gpu, before) for gpu in [(7, 5), (8, 6), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)]
    }
    assert found == {
        (7, 5): None, (8, 6): "8.0", (9, 0): "9.0a", (10, 3): None, (11, 0): None,
        (12, 1): "12.0+PTX", (13, 0): "12.0+PTX",
    }  # fmt: skip


def test_every_gpu_finds_code_that_it_can_run() -> None:
    gpus = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]
    assert [gpu for gpu in gpus if code_for(gpu, _build.CUDA_ARCHITECTURES) is None] == []
    # e4m3 is converted by an instruction from 8.9 on.
    assert code_for((8, 9), _build.CUDA_ARCHITECTURES) == "8.9"


def test_no_code_is_for_one_chip_alone() -> None:
    assert not re.search(r"[a-z]", _build.CUDA_ARCHITECTURES)


def test_continuous_integration_checks_architectures_that_are_built() -> None:
    ci = (checkout.ROOT / ".ci" / "run").read_text()
    [checked] = re.findall(r'CUDA_CHECK_ARCHITECTURES="(.*)"', ci)
    assert set(checked.split(";")) <= set(_build.CUDA_ARCHITECTURES.split(";"))


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
