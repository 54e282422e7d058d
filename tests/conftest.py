from __future__ import annotations

import pytest
import torch

from lean_attention._core import core


@pytest.fixture(autouse=True)
def fresh_random_inputs(request: pytest.FixtureRequest) -> None:
    """A new seed for every test and run, shown where a test fails."""
    seed = torch.seed()
    request.node.user_properties.append(("seed", seed))
    print(f"torch.manual_seed({seed})")


@pytest.fixture(params=core.instruction_sets().split())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine can run, in turn."""
    monkeypatch.setenv("LEAN_ATTENTION_CPU", request.param)
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
