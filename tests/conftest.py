from __future__ import annotations

import pytest
import torch

from tests import emulation
from tests.backends import BACKENDS, CPUS, INSTRUCTION_SETS, Backend, Cpu, Cuda, Emulated, marked
from tests.versions import versions

# With --quick, at most so many cases of each test on each backend, from first to last at equal distances.
QUICK_CASES = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="one instruction set, few cases of each test, nothing marked slow",
    )


def pytest_configure(config: pytest.Config) -> None:
    emulation.may_build = not config.getoption("quick")


def pytest_report_header() -> str:
    return versions()


@pytest.fixture(autouse=True)
def fresh_random_inputs(request: pytest.FixtureRequest) -> None:
    """A new seed for every test and run, shown where a test fails."""
    seed = torch.seed()
    request.node.user_properties.append(("seed", seed))
    print(f"torch.manual_seed({seed})")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine can run, in turn."""
    monkeypatch.setenv("LEAN_ATTENTION_CPU", request.param)
    return request.param


@pytest.fixture(params=[marked(name) for name in BACKENDS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend in turn, and a CPU with each instruction set; tests.backends has other choices."""
    if request.param in CPUS:
        monkeypatch.setenv("LEAN_ATTENTION_CPU", request.param.removeprefix("cpu-"))
    return {"emulated": Emulated, "cuda": Cuda}.get(request.param, Cpu)()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    if config.getoption("quick"):
        kept = quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def quick(items: list[pytest.Item]) -> list[pytest.Item]:
    """Few cases of every test, with this machine's best instruction set; none that is slow or for a GPU."""
    others = {*INSTRUCTION_SETS[1:], *CPUS[1:]}
    cases: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        runs_on = [parameters.get(name) for name in ("instruction_set", "backend")]
        left_out = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if not left_out and others.isdisjoint(runs_on):
            cases.setdefault((item.path, item.originalname, *runs_on), []).append(item)
    step = {test: -(-len(found) // QUICK_CASES) for test, found in cases.items()}
    return [item for test, found in cases.items() for item in found[:: step[test]]]
