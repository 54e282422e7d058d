"""What the plugin does with a vLLM that it can, cannot or may not serve."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import vllm
from vllm import logger as vllm_logger
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from lean_attention.integrations import vllm as integration
from lean_attention.integrations.vllm.backend import LeanAttentionBackend


@pytest.fixture(autouse=True)
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    for once in (vllm_logger._print_info_once, vllm_logger._print_warning_once):
        once.cache_clear()
    # Whether vLLM has configured its loggers by now depends on what ran before.
    logger = logging.getLogger("vllm.lean_attention")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "disabled", False)
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)
    AttentionBackendEnum.CPU_ATTN.clear_override()
    yield caplog
    logger.removeHandler(caplog.handler)
    AttentionBackendEnum.CPU_ATTN.clear_override()


def backend_class() -> type:
    return AttentionBackendEnum.CPU_ATTN.get_class()


def test_entry_point_of_the_installed_package() -> None:
    (found,) = [
        point for point in entry_points(group="vllm.general_plugins") if point.name == "lean_attention"
    ]
    assert found.load() is integration.register


def test_serves(log: pytest.LogCaptureFixture) -> None:
    integration.register()
    integration.register()  # vLLM calls plugins more than once
    assert backend_class() is LeanAttentionBackend
    assert log.messages == []


def test_switched_off(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAN_ATTENTION_VLLM", "0")
    integration.register()
    assert backend_class() is cpu_attn.CPUAttentionBackend
    assert log.messages == ["lean_attention: switched off by LEAN_ATTENTION_VLLM=0"]


def test_variable_that_says_nothing(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAN_ATTENTION_VLLM", "off")
    integration.register()
    assert backend_class() is cpu_attn.CPUAttentionBackend
    assert "LEAN_ATTENTION_VLLM is 'off'; it must be 0 or 1" in log.text


def test_build_for_gpus(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, device_name="cuda")
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    integration.register()
    assert backend_class() is cpu_attn.CPUAttentionBackend
    assert "built for cuda and is left alone" in log.text


@pytest.mark.parametrize("version", ["0.33.0", "0.320.0", "dev"])
def test_untested_version(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    integration.register()
    assert backend_class() is LeanAttentionBackend
    assert f"tested with vLLM 0.32, not with {version}" in log.text


def test_changed_interface(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, skip_softmax=False):
        pass

    monkeypatch.setattr(cpu_attn.CPUAttentionBackendImpl, "forward", forward)
    integration.register()
    assert backend_class() is cpu_attn.CPUAttentionBackend
    assert "CPUAttentionBackendImpl.forward: output_block_scale, output_scale, skip_softmax" in log.text


def test_missing_interface(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu_attn, "CPUAttentionMetadata")
    integration.register()
    assert backend_class() is cpu_attn.CPUAttentionBackend
    assert "vLLM is not served (AttributeError" in log.text
