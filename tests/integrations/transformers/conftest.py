from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    from lean_attention.integrations.transformers import register

    register(prefill="sdpa")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small steps, some of them in a thread beside the test's
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the integration warns of, each time that it does."""
    messages: list[str] = []

    def warning_once(_logger, message, *_args, **_options) -> None:
        if message.startswith("lean_attention"):
            messages.append(message)

    monkeypatch.setattr("logging.Logger.warning_once", warning_once)
    return messages
