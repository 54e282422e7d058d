"""Continuous batching: the tokens of one request after another, from pages that are read where they lie."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import lean_attention
from lean_attention.integrations.transformers import PAGED_NAME
from lean_attention.integrations.transformers.continuous_batching import paged_attention
from tests.integrations.transformers.tiny_models import CACHE, MODELS, SMALL, count_decodes, make_model, use

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = (3, 40, 17, 29, 100, 1)


def generate_batch(model, prompts: list[list[int]], page_size: int, new_tokens: int = 20) -> list[list[int]]:
    """By continuous batching: in steps of 64 tokens of prompts and new ones, so that steps mix the two."""
    done = model.generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.generation.ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=64, page_size=page_size
        ),
        progress_bar=False,
    )
    return [done[name].generated_tokens for name in sorted(done, key=lambda name: int(name.split("_")[-1]))]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("page_size", [16, 5])
@torch.no_grad()
def test_continuous_batching(
    kind: str, page_size: int, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    model = make_model(kind)
    prompts = [torch.randint(2, 128, (length,)).tolist() for length in PROMPTS]
    want = [
        model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    use(model, PAGED_NAME)
    calls = count_decodes(monkeypatch)
    assert generate_batch(model, prompts, page_size) == want
    assert len(calls) >= 20 * SMALL["num_hidden_layers"]
    assert not said


@torch.no_grad()
def test_a_cache_asks_for_huge_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(lean_attention, "use_huge_pages", asked.append)
    model = make_model("llama")
    use(model, PAGED_NAME)
    generate_batch(model, [[2, 3, 4]], 16)
    assert len(asked) == 1
    assert asked[0].untyped_storage().nbytes() > 64 * 16 * 8  # all of the cache, not a layer's new tokens


def count_copied_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that each `torch.index_select` copies, by which transformers gathers a layer's K or V."""
    copied: list[int] = []
    index_select = torch.index_select

    def counted(source: torch.Tensor, dim: int, index: torch.Tensor, **options) -> torch.Tensor:
        if source.dim() == 3:  # [tokens, heads, dim]
            copied.append(index.numel())
        return index_select(source, dim, index, **options)

    monkeypatch.setattr(torch, "index_select", counted)
    return copied


@pytest.mark.parametrize("attention", [PAGED_NAME, "sdpa"], ids=["paged", "sdpa"])
@torch.no_grad()
def test_no_token_of_a_full_layer_is_copied(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    use(model, attention)
    copied = count_copied_tokens(monkeypatch)
    generate_batch(model, [torch.randint(2, 128, (length,)).tolist() for length in PROMPTS], 16)
    # transformers' own attention shows that the count sees what it is to see.
    assert (sum(copied) == 0) == (attention == PAGED_NAME)


@torch.no_grad()
def test_sliding_layers_copy_while_prompts_are_read_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring buffer of a window's length: several new tokens would overwrite what the first of them sees."""
    model = make_model("mistral")
    use(model, PAGED_NAME)
    prompts = [torch.randint(2, 128, (40,)).tolist()]
    copied = count_copied_tokens(monkeypatch)
    generate_batch(model, prompts, 16, new_tokens=20)
    short = list(copied)
    copied.clear()
    generate_batch(model, prompts, 16, new_tokens=60)
    assert copied == short


@torch.no_grad()
def test_layers_that_do_not_hand_the_cache_on_are_gathered_and_said_so(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """A model that transforms its keys behind the cache, as latent attention does."""
    if CACHE != "cache":
        pytest.skip(f"transformers {transformers.__version__} gives the cache to the attention function")
    model = make_model("llama")
    prompts = [torch.randint(2, 128, (length,)).tolist() for length in PROMPTS]
    update = PagedAttentionCache.update

    def scaled_update(*arguments, **options):
        key, value = update(*arguments, **options)
        return key * 1.0, value

    use(model, "eager")
    want = [
        model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    monkeypatch.setattr(PagedAttentionCache, "update", scaled_update)
    use(model, PAGED_NAME)
    assert generate_batch(model, prompts, 16) == want
    assert any("does not hand its paged cache on" in message for message in said)
    assert any(transformers.__version__ in message and "docs/transformers.md" in message for message in said)


@torch.no_grad()
def test_options_that_transformers_would_ignore_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own attention of continuous batching has no softcap."""
    monkeypatch.setitem(MODELS, "gemma2", {**MODELS["gemma2"], "head_dim": 12})
    model = make_model("gemma2")
    use(model, PAGED_NAME)
    inputs = torch.randn(1, 4, 5, 12)
    attention = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"continuous batching cannot run Gemma2Attention: a head_dim of 12"):
        paged_attention(attention, inputs, inputs, inputs, None, softcap=5.0, cache=object())


def test_the_pinned_version_is_one_that_the_docs_name() -> None:
    """What is tested: the oldest version admitted, the pinned one, and what `make test-newest` finds."""
    page = (ROOT / "docs" / "transformers.md").read_text()
    pins = (ROOT / "third_party" / "constraints.txt").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    tested = re.search(r"transformers (\d+\.\d+) to (\d+\.\d+)", page)
    assert tested, "docs/transformers.md names the versions"
    assert f"transformers=={tested[2]}." in pins
    assert f"transformers>={tested[1]}" in project
    print(f"this run: transformers {transformers.__version__}")


@torch.no_grad()
def test_continuous_batching_of_head_dims_that_the_op_has_not(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setitem(MODELS, "qwen3", {"head_dim": 12})
    model = make_model("qwen3")
    prompt = torch.randint(2, 128, (17,)).tolist()
    want = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 17:].tolist()
    use(model, PAGED_NAME)
    assert generate_batch(model, [prompt], 16) == [want]
    assert set(said) == {"lean_attention: continuous batching is left to transformers: a head_dim of 12"}
