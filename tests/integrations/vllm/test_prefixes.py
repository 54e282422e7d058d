"""Requests that begin alike: prefixes are read once, and the tokens are those of vLLM's own attention."""

from __future__ import annotations

from pathlib import Path

import pytest

import lean_attention
from lean_attention.integrations.vllm import prefixes
from tests.integrations.vllm.engines import engine, expect_same, generate, metric, prompts, save_model
from tests.integrations.vllm.test_models import FAMILIES

BLOCK = 32
LENGTHS = {"max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What `decode` is called with."""
    made: list[dict] = []
    decode = lean_attention.decode

    def counted(*args, **kwargs):
        made.append(kwargs)
        return decode(*args, **kwargs)

    monkeypatch.setattr(lean_attention, "decode", counted)
    return made


def chats(levels: tuple[int, int]) -> list[list[int]]:
    """Requests of two users in turns that follow one system prompt, and one that does not."""
    system, first, second = prompts(seed=3, lengths=(levels[0], levels[1], levels[1]))
    tails = prompts(seed=4, lengths=(3, 40, 17, 1, 50))
    beginnings = (system + first, system + second, system + first, system + second, [])
    return [beginning + tail for beginning, tail in zip(beginnings, tails, strict=True)]


def rows_of(calls: list[dict]) -> set[tuple]:
    """The forests of calls of one query token a request, as rows."""
    return {
        tuple(map(tuple, call["shared"].tolist()))
        for call in calls
        if call["shared"] is not None and call["cu_seqlens_q"].diff().max() == 1
    }


TWO_LEVELS = ((0, 4, 0, 64), (0, 2, 64, 128), (2, 4, 64, 128))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_common_prompts(
    models: Path, family: str, calls: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With full attention in all layers, or in every second one beside sliding windows."""
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 2 * BLOCK)
    config_class, options = FAMILIES[family]
    model = save_model(models / family, config_class, **options)
    asked = chats((70, 60))
    with engine(model, ours=False, block_size=BLOCK) as llm:
        expected = generate(llm, asked)
    assert not calls
    with engine(model, ours=True, block_size=BLOCK) as llm:
        generate(llm, asked)
        calls.clear()
        found = generate(llm, asked)
    assert all(output.num_cached_tokens >= 128 for output in found[:4])
    expect_same(found, expected)
    assert TWO_LEVELS in rows_of(calls)
    windows = [call for call in calls if call["window_left"] >= 0]
    assert all(call["shared"] is None for call in windows) and bool(windows) == (family != "llama")


def test_layers_that_cannot_share(models: Path, calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 2 * BLOCK)
    for family in ("mistral", "bloom"):
        config_class, options = FAMILIES[family]
        model = save_model(models / family, config_class, **options)
        with engine(model, ours=False, block_size=BLOCK) as llm:
            expected = generate(llm, chats((70, 60)))
        with engine(model, ours=True, block_size=BLOCK) as llm:
            calls.clear()
            expect_same(generate(llm, chats((70, 60))), expected)
        assert calls and all(call["shared"] is None for call in calls)


def test_lengths_that_pay(models: Path, calls: list[dict]) -> None:
    """As shipped, a prefix of 512 tokens is shared, and a second level of 64 is not."""
    model = save_model(models / "long", "LlamaConfig", **LENGTHS)
    options = {"block_size": BLOCK, "max_model_len": 1024}
    asked = chats((512, 64))
    with engine(model, ours=False, **options) as llm:
        expected = generate(llm, asked)
    with engine(model, ours=True, **options) as llm:
        expect_same(generate(llm, asked), expected)
    assert ((0, 4, 0, 512),) in rows_of(calls)


def test_speculation(models: Path, calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests have counts of query tokens of their own, and another order."""
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 2 * BLOCK)
    model = save_model(models / "llama", "LlamaConfig")
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    asked = chats((70, 60))
    with engine(model, ours=False, block_size=BLOCK) as llm:
        expected = generate(llm, asked)
    with engine(model, ours=True, block_size=BLOCK, speculative_config=speculation) as llm:
        expect_same(generate(llm, asked), expected)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
    shared = [call["cu_seqlens_q"].diff() for call in calls if call["shared"] is not None]
    assert any(counts.min() < counts.max() <= prefixes.MOST_NEW_TOKENS for counts in shared)


def test_preemption(models: Path, calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests lose their blocks and come back to shared ones."""
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 2 * BLOCK)
    model = save_model(models / "llama", "LlamaConfig")
    asked = chats((70, 60))
    with engine(model, ours=False, block_size=BLOCK) as llm:
        expected = generate(llm, asked)
    with engine(model, ours=True, block_size=BLOCK, num_gpu_blocks_override=13, max_model_len=224) as llm:
        expect_same(generate(llm, asked), expected)
        assert metric(llm, "vllm:num_preemptions") > 0
    assert len(rows_of(calls)) > 1
