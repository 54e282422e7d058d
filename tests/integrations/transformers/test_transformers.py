"""Small models with random weights: every step's logits as by eager attention, and the same greedy tokens."""

from __future__ import annotations

import pytest
import torch
import transformers

from lean_attention.integrations.transformers import NAME, register, visible_tokens
from tests.integrations.transformers.tiny_models import (
    CACHE,
    MODELS,
    SMALL,
    count_decodes,
    generate,
    left_padded,
    make_model,
    use,
)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_greedy_tokens_and_logits_are_those_of_eager(
    kind: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_model(kind), left_padded((17, 9, 1))
    # Static caches are for compiled steps; whether it compiles is another test.
    options = {"cache_implementation": cache, "disable_compile": True} if cache == "static" else {}
    want = generate(model, inputs, **options)
    calls = count_decodes(monkeypatch)
    use(model, NAME)
    got = generate(model, inputs, **options)
    assert len(calls) >= 19 * SMALL["num_hidden_layers"]
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_bf16_logits_are_as_near_to_fp32_as_those_of_eager(kind: str) -> None:
    """Teacher-forced, step by step, so that one different token does not make the rest incomparable."""
    inputs, steps = left_padded((17, 9, 1)), torch.randint(2, 128, (3, 12))

    def logits(dtype: torch.dtype, attention: str) -> torch.Tensor:
        model = make_model(kind, dtype)
        use(model, attention)
        cache = transformers.DynamicCache(config=model.config)
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        out = []
        for i in range(steps.shape[1] + 1):
            step = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, use_cache=True)
            out.append(step.logits[:, -1].float())
            if i < steps.shape[1]:
                ids, mask = steps[:, i : i + 1], torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        return torch.stack(out)

    want = logits(torch.float32, "eager")
    eager, ours = logits(torch.bfloat16, "eager"), logits(torch.bfloat16, NAME)
    assert (ours - want).abs().max() <= 2 * (eager - want).abs().max()


@torch.no_grad()
def test_beam_search_and_assisted_generation() -> None:
    model, inputs = make_model("llama"), left_padded((9,))
    assistant = make_model("qwen2")
    for options in ({"num_beams": 3}, {"assistant_model": assistant}):
        want = model.generate(**inputs, max_new_tokens=20, do_sample=False, **options)
        use(model, NAME)
        use(assistant, NAME)
        got = model.generate(**inputs, max_new_tokens=20, do_sample=False, **options)
        use(model, "eager")
        assert torch.equal(got, want)


@torch.no_grad()
def test_masks_with_holes_are_left_to_another_and_said_so(said: list[str]) -> None:
    model, inputs = make_model("llama"), left_padded((17, 9))
    inputs["attention_mask"][0, 5:8] = 0
    want = generate(model, inputs)
    use(model, NAME)
    got = generate(model, inputs)
    assert torch.equal(got.sequences, want.sequences)
    assert set(said) == {
        "lean_attention: some steps of LlamaAttention are left to 'sdpa' attention: an attention mask that "
        "is not lengths, left padding and one window"
    }


@torch.no_grad()
def test_static_cache_compiles() -> None:
    model, inputs = make_model("llama"), left_padded((17, 9))
    want = generate(model, inputs)
    use(model, NAME)
    got = generate(model, inputs, cache_implementation="static")
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_compiled_steps_of_several_tokens_have_no_graph_break(kind: str) -> None:
    """As in speculation: the model is compiled whole, so that nothing may look at a mask's contents."""
    torch.compiler.reset()
    model, inputs = make_model(kind), left_padded((17, 9))
    drafts = torch.randint(2, 128, (2, 2, 4))

    def logits(step) -> list[torch.Tensor]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        mask = inputs["attention_mask"]
        model(**inputs, **{CACHE: cache})
        out = []
        for draft in drafts:
            mask = torch.cat([mask, torch.ones_like(draft)], dim=1)
            out.append(step(input_ids=draft, attention_mask=mask, **{CACHE: cache}).logits)
        return out

    want = logits(model)
    use(model, NAME)
    got = logits(torch.compile(model, backend="eager", fullgraph=True))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
        ("falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    ],
)
@torch.no_grad()
def test_models_that_the_interface_does_not_reach_stay_as_they_are(kind: str, options: dict) -> None:
    """The families with ALiBi have attention of their own, which takes no implementation by name."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=128, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    inputs = left_padded((9, 4))
    want = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    use(model, NAME)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), want)


def test_training_is_left_to_another() -> None:
    model, inputs = make_model("llama"), left_padded((5,))
    use(model, NAME)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_visible_tokens_says_what_the_mask_says() -> None:
    token = torch.arange(30)
    position = 20 + torch.arange(4)[:, None]
    causal = (token <= position).expand(2, 1, 4, 30).clone()
    visible = visible_tokens(causal.clone())
    assert (visible.seq_lens == 24).all() and (visible.leftpad == 0).all() and visible.window_left == -1
    padded = causal.clone()
    padded[1, ..., :7] = False
    assert visible_tokens(padded).leftpad.tolist() == [0, 7]
    windowed = padded & (token >= position - 9)
    assert visible_tokens(windowed).window_left == 9
    holes = causal.clone()
    holes[0, 0, :, 11] = False
    assert visible_tokens(holes) is None
    nothing = torch.zeros(1, 1, 1, 30, dtype=torch.bool)
    assert visible_tokens(nothing).seq_lens.tolist() == [0]


def test_an_unknown_prefill_is_named() -> None:
    with pytest.raises(ValueError, match=r"prefill is 'fast'; it must be one of .*sdpa"):
        register(prefill="fast")
