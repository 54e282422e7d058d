"""Several sequences from one prompt: it is read once, kept tokens are read once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import lean_attention
from lean_attention.integrations.transformers import CACHE_PARAMETER, LeanCache, accelerate
from tests.integrations.transformers.tiny_models import left_padded, make_model

MODES = {
    "samples": {"num_return_sequences": 3, "do_sample": True},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "beam-samples": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
}


def watch(monkeypatch: pytest.MonkeyPatch, model) -> tuple[list[int], list[list[list[int]]]]:
    """Rows of the decoder's calls behind its hooks, and the rows of `shared` of all calls of the op."""
    rows: list[int] = []
    shared: list[list[list[int]]] = []
    embed = model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    decode = lean_attention.decode

    def counted(*args, **kwargs):
        if kwargs.get("shared") is not None:
            shared.append(kwargs["shared"].tolist())
        return decode(*args, **kwargs)

    monkeypatch.setattr(lean_attention, "decode", counted)
    return rows, shared


def tokens_of(model, inputs: dict, options: dict) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(**inputs, max_new_tokens=12, **options)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", [7, 33, 48])
@torch.no_grad()
def test_tokens_are_those_of_eager(
    kind: str, mode: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = MODES[mode]
    model, inputs = make_model(kind), {"input_ids": torch.randint(2, 128, (2, prompt))}
    want = tokens_of(model, inputs, options)
    accelerate(model)
    rows, shared = watch(monkeypatch, model)
    assert torch.equal(tokens_of(model, inputs, options), want)
    repeats = max(options.get("num_beams", 1), options["num_return_sequences"])
    assert rows[0] == 2 and set(rows[1:]) == {2 * repeats}
    expected = [[0, repeats, 0, prompt], [repeats, 2 * repeats, 0, prompt]]
    assert shared and all(each == expected for each in shared)


@torch.no_grad()
def test_left_padded_prompts_are_read_once_and_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_model("llama"), left_padded((30, 12))
    want = tokens_of(model, inputs, MODES["samples"])
    accelerate(model)
    rows, shared = watch(monkeypatch, model)
    assert torch.equal(tokens_of(model, inputs, MODES["samples"]), want)
    assert rows[0] == 2 and not shared


@pytest.mark.parametrize("kv_cache", ["int8", "float8_e4m3fn"])
@torch.no_grad()
def test_quantised_caches_read_the_prompt_once(kv_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = accelerate(make_model("llama"), kv_cache), {"input_ids": torch.randint(2, 128, (1, 33))}
    rows, _ = watch(monkeypatch, model)
    several = model.generate(**inputs, max_new_tokens=8, num_return_sequences=3, num_beams=3, do_sample=False)
    assert rows[0] == 1 and several.shape == (3, 41)


@torch.no_grad()
def test_rows_that_differ_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step of one's own, with a cache that expects repetitions."""
    model = make_model("llama")
    tokens = torch.randint(2, 128, (4, 9))
    want = model(tokens).logits
    accelerate(model)
    rows, shared = watch(monkeypatch, model)
    cache = LeanCache(model.config)
    cache.sequences_per_prompt = 2
    got = model(tokens, use_cache=True, **{CACHE_PARAMETER: cache}).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert rows == [4] and not shared and cache.sequences_per_prompt == 1


def repeated_cache() -> LeanCache:
    model = accelerate(make_model("llama"))
    cache = LeanCache(model.config)
    cache.sequences_per_prompt = 2
    with torch.no_grad():
        tokens = torch.randint(2, 128, (2, 9)).repeat_interleave(2, dim=0)
        model(tokens, use_cache=True, **{CACHE_PARAMETER: cache})
    assert len(cache.layers[0].keys) == 4 and cache.layers[0].prompt.tokens == 9
    return cache


def test_what_breaks_the_sharing_ends_it() -> None:
    cache = repeated_cache()
    cache.reorder_cache(torch.tensor([1, 1, 2, 3]))
    assert cache.layers[0].prompt.sequences == 2
    cache.crop(-4)
    assert cache.layers[0].prompt.tokens == 5
    cache.reorder_cache(torch.tensor([0, 2, 1, 3]))
    assert cache.layers[0].prompt is None
    for change in (
        lambda cache: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reset(),
    ):
        cache = repeated_cache()
        change(cache)
        assert cache.layers[0].prompt is None


def test_undone_with_the_rest() -> None:
    model = accelerate(make_model("llama"))
    accelerate(model, kv_cache=None)
    decoder = model.get_decoder()
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks
