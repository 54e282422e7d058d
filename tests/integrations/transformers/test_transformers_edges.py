"""What the op cannot say is left to an implementation that can, gives its result, and is said once."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import transformers

from lean_attention.integrations.transformers import NAME, attention, prefill, register
from tests.integrations.transformers.tiny_models import (
    CACHE,
    count_decodes,
    generate,
    left_padded,
    make_model,
    use,
)


def assert_as_eager(model, inputs: dict, rtol: float = 1e-4, **options) -> None:
    """Greedy tokens and every step's logits."""
    use(model, "eager")
    want = generate(model, inputs, **options)
    use(model, NAME)
    got = generate(model, inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-4)


def logits_of(model, attention: str, **inputs) -> torch.Tensor:
    use(model, attention)
    return model(**inputs).logits


def right_padded(lengths: tuple[int, ...]) -> dict:
    longest = max(lengths)
    ids = torch.randint(2, 128, (len(lengths), longest))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


# 1. Options of the attention interface.


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
@torch.no_grad()
def test_chosen_tokens_of_sparse_families_are_honoured(kind: str, said: list[str]) -> None:
    """They choose 8 of the tokens for each query, and tell eager attention by the mask alone."""
    model = make_model(kind)
    assert_as_eager(model, left_padded((30, 17)))
    assert any("not lengths, left padding and one window" in message for message in said)


@torch.no_grad()
def test_chosen_tokens_run_through_the_op_while_they_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("deepseek_v32", index_topk=64)
    calls = count_decodes(monkeypatch)
    assert_as_eager(model, left_padded((17, 9)))
    assert calls


@torch.no_grad()
def test_options_that_only_a_family_knows_go_to_its_eager_attention(said: list[str]) -> None:
    model = make_model("inkling2_text")
    assert_as_eager(model, left_padded((9, 5)))
    assert any("position_bias and sinks" in message for message in said)


@torch.no_grad()
def test_an_unknown_option_is_said_by_name_and_known_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    model = make_model("llama")
    attention = model.model.layers[0].self_attn
    use(model, NAME)
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
    function = transformers.AttentionInterface()[NAME]
    calls = count_decodes(monkeypatch)
    plain, _ = function(
        attention, q, k, k, None, scaling=0.25, position_ids=torch.zeros(1, 1), use_cache=True
    )
    assert calls and not said
    calls.clear()
    eager, weights = function(attention, q, k, k, None, scaling=0.25, new_option=torch.ones(1))
    assert not calls and weights is not None
    assert len(said) == 1 and "new_option" in said[0] and "LlamaAttention" in said[0]
    torch.testing.assert_close(plain, eager)


def test_an_unknown_option_of_a_module_without_eager_attention_is_an_error() -> None:
    module = types.SimpleNamespace(is_causal=True)
    q = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match=r"SimpleNamespace has no eager attention of its own.*new_option"):
        transformers.AttentionInterface()[NAME](module, q, q, q, None, new_option=1)


# 2. The prefill implementation.


@pytest.mark.parametrize(
    "prefill", [pytest.param("flex_attention", marks=pytest.mark.slow), "eager", "sdpa", "auto"]
)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("lengths", [(40, 40), (40, 9)], ids=["even", "ragged"])
@torch.no_grad()
def test_every_prefill_gives_eagers_results(
    prefill: str, kind: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(prefill=prefill)
    monkeypatch.setattr(attention, "op_is_faster", lambda *_: True)
    assert_as_eager(make_model(kind), left_padded(lengths))


@pytest.mark.parametrize("faster", [True, False])
@torch.no_grad()
def test_prompts_go_where_they_are_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    register(prefill="auto")
    monkeypatch.setattr(attention, "op_is_faster", lambda *_: faster)
    calls = count_decodes(monkeypatch)
    model = make_model("llama")
    for inputs in (left_padded((40, 40)), left_padded((40, 9))):
        seen = inputs["attention_mask"].bool()
        want, got = logits_of(model, "eager", **inputs), logits_of(model, NAME, **inputs)
        torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)
    assert bool(calls) == faster
    calls.clear()
    inputs = right_padded((40, 9))  # which the op cannot say
    want = logits_of(model, "eager", **inputs)
    torch.testing.assert_close(logits_of(model, NAME, **inputs), want, rtol=1e-4, atol=1e-4)
    assert not calls and not said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_faster_of_two_is_measured(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 4, 64, 16, dtype=dtype), torch.randn(1, 2, 64, 16, dtype=dtype)
    assert prefill.op_is_faster(q, k, k) in (True, False)
    op, sdpa = prefill._times(dtype, 2, 16, 16, torch.get_num_threads())
    for line in (op, sdpa):
        assert 0 <= line(100) <= line(10**6) <= line(10**9)
    assert not prefill.op_is_faster(q, k.float(), k.half())


def test_a_prefill_that_cannot_work_is_refused() -> None:
    for name in ("flash_attention_2", "paged|eager", NAME, "fast"):
        with pytest.raises(ValueError, match=r"must be one of auto, eager, flex_attention, sdpa"):
            register(prefill=name)


@torch.no_grad()
def test_registering_again_keeps_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sdpa = transformers.AttentionInterface()["sdpa"]

    def counted(*arguments, **options):
        calls.append(1)
        return sdpa(*arguments, **options)

    transformers.AttentionInterface.register("counted", counted)
    transformers.AttentionMaskInterface.register("counted", transformers.masking_utils.sdpa_mask)
    register(prefill="counted")
    register()
    model = make_model("llama")
    logits_of(model, NAME, **left_padded((40, 9)))
    assert calls


# 3. and 4. Masks of the caller's own.


def in_place_steps(model, mask: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """Steps of one token with a static cache and a mask of all its tokens, filled in place."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=mask.shape[-1])
    logits = []
    for position in range(ids.shape[1]):
        mask[..., position] = True
        step = {"input_ids": ids[:, position : position + 1], "attention_mask": mask, CACHE: cache}
        logits.append(model(**step, position_ids=torch.tensor([[position]])).logits)
    mask.fill_(False)
    return logits


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_filled_in_place_is_read_at_every_step(mode) -> None:
    model, other = make_model("llama"), make_model("qwen2")
    with mode():
        mask, ids = torch.zeros(2, 1, 1, 20, dtype=torch.bool), torch.randint(2, 128, (2, 12))
        want = []
        for each in (model, other):  # the same buffer for both
            use(each, "sdpa")
            want += in_place_steps(each, mask, ids)
        got = []
        for each in (model, other):
            use(each, NAME)
            got += in_place_steps(each, mask, ids)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masks_are_broadcast_as_by_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    ids = torch.randint(2, 128, (2, 9))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    calls = count_decodes(monkeypatch)
    for mask in (causal[None, None], causal[None, None].expand(2, 1, 9, 9), torch.ones(1, 1, 1, 9) > 0):
        got = logits_of(model, NAME, input_ids=ids, attention_mask=mask)
        assert calls
        calls.clear()
        torch.testing.assert_close(
            got, logits_of(model, "sdpa", input_ids=ids, attention_mask=mask), rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_masks_of_floats_that_say_seen_or_not_run_through_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), torch.randint(2, 128, (2, 9))
    mask = torch.zeros(1, 1, 9, 9).masked_fill(
        torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min
    )
    want = logits_of(model, "eager", input_ids=ids, attention_mask=mask)
    calls = count_decodes(monkeypatch)
    got = logits_of(model, NAME, input_ids=ids, attention_mask=mask)
    assert calls
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bloom", "mpt", "gpt_oss", "bigbird_pegasus", "llama"])
@torch.no_grad()
def test_models_that_are_given_the_name_when_they_are_made(kind: str) -> None:
    """transformers then asks nobody whether the family takes an implementation by name, or bool masks."""
    model = make_model(kind)
    named = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=NAME).eval()
    named.load_state_dict(model.state_dict())
    assert named.config._attn_implementation == NAME
    for inputs in (left_padded((40, 40)), left_padded((40, 9))):
        seen = inputs["attention_mask"].bool()
        want, got = model(**inputs).logits[seen], named(**inputs).logits[seen]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# 5. Autocast.


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_autocast_around_a_float32_model(kind: str) -> None:
    model, inputs = make_model(kind), left_padded((9, 5))
    seen = inputs["attention_mask"].bool()  # padding has no right result
    want = logits_of(model, "eager", **inputs)[seen]
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = (logits_of(model, attention, **inputs)[seen] for attention in ("eager", NAME))
    assert (ours - want).abs().max() <= 2 * (eager - want).abs().max()


# 6. Softcap and sinks where the op cannot run the step.

CHANGED_SCORES = ["gemma2", "gpt_oss", "t5gemma"]


def seq2seq_inputs(kind: str, inputs: dict) -> dict:
    return {**inputs, "decoder_input_ids": inputs["input_ids"][:, :6]} if kind == "t5gemma" else inputs


@pytest.mark.parametrize("kind", CHANGED_SCORES)
@torch.no_grad()
def test_right_padded_batches_of_models_with_changed_scores(kind: str, said: list[str]) -> None:
    model = make_model(kind)
    inputs = seq2seq_inputs(kind, right_padded((20, 11)))
    got, want = logits_of(model, NAME, **inputs), logits_of(model, "eager", **inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if kind != "t5gemma":  # whose masks are lengths
        assert len(set(said)) == 1 and "left to 'eager'" in said[0]


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
@torch.no_grad()
def test_packed_positions_of_models_with_changed_scores(kind: str) -> None:
    model = make_model(kind)
    inputs = {"input_ids": torch.randint(2, 128, (1, 12)), "use_cache": False}
    inputs["position_ids"] = torch.tensor([[*range(7), *range(5)]])
    got, want = logits_of(model, NAME, **inputs), logits_of(model, "eager", **inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", *CHANGED_SCORES])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_eager(kind: str, training: bool) -> None:
    model = make_model(kind).train(training)
    inputs = seq2seq_inputs(kind, right_padded((20, 11)))
    gradients = []
    for name in ("eager", NAME):
        model.zero_grad()
        torch.manual_seed(0)
        logits_of(model, name, **inputs).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# 7. Compiled forward passes.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert", "gemma2"])
@torch.no_grad()
def test_compiled_passes_with_right_padding(kind: str) -> None:
    torch.compiler.reset()
    model, inputs = make_model(kind), right_padded((20, 11))
    want = logits_of(model, "sdpa" if kind != "gemma2" else "eager", **inputs)
    use(model, NAME)
    got = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# 8. Said once.


@torch.no_grad()
def test_a_reason_is_the_same_at_every_step(said: list[str]) -> None:
    model, inputs = make_model("llama"), left_padded((9, 5))
    use(model, NAME)
    cache = transformers.DynamicCache(config=model.config)
    for step in range(4):  # a mask of biases, which grows
        mask = torch.rand(2, 1, 1, step + 1)
        model(**{"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask, CACHE: cache})
    assert len(said) > 1 and len(set(said)) == 1
