"""Greedy tokens and their probabilities are those of vLLM's own attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integrations.vllm.engines import (
    NEW_TOKENS,
    engine,
    expect_same,
    generate,
    log_probabilities,
    metric,
    prompts,
    reasons,
    sampling,
    save_model,
    tokens_of,
)

WINDOW = 16
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 64, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "sliding_window": WINDOW,
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def llama(models: Path) -> str:
    return save_model(models / "llama", "LlamaConfig")


@pytest.fixture(scope="module")
def expected(models: Path) -> list:
    """What vLLM's own attention makes of the Llama."""
    with engine(save_model(models / "llama", "LlamaConfig"), ours=False) as llm:
        return generate(llm, prompts())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(models: Path, family: str) -> None:
    config_class, options = FAMILIES[family]
    model = save_model(models / family, config_class, **options)
    with engine(model, ours=False) as llm:
        expected = generate(llm, prompts())
        assert reasons(llm) == {"vLLM's own"}
    with engine(model, ours=True) as llm:
        found = generate(llm, prompts())
        assert reasons(llm) == {None}
    expect_same(found, expected)


def test_wrong_attention_is_seen(llama: str, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    import lean_attention

    decode = lean_attention.decode

    def one_token_less(q, k_cache, v_cache, seq_lens, *args, **kwargs):
        return decode(q, k_cache, v_cache, (seq_lens - 1).clamp(min=1), *args, **kwargs)

    monkeypatch.setattr(lean_attention, "decode", one_token_less)
    with engine(llama, ours=True) as llm:
        found = generate(llm, prompts())
    with pytest.raises(AssertionError):
        expect_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(llama: str, expected: list, dtype: torch.dtype) -> None:
    with engine(llama, ours=True, dtype=dtype) as llm:
        found = generate(llm, prompts(), new_tokens=1)
        assert reasons(llm) == {None}
    first = log_probabilities(expected)[:, :1]
    torch.testing.assert_close(log_probabilities(found), first, atol=0.2, rtol=0)


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
def test_fp8_caches(llama: str, expected: list, kv_cache_dtype: str) -> None:
    with engine(llama, ours=True, kv_cache_dtype=kv_cache_dtype) as llm:
        found = generate(llm, prompts(), new_tokens=1)
        assert reasons(llm) == {None}
    difference = (log_probabilities(found) - log_probabilities(expected)[:, :1]).abs()
    assert 0 < difference.max() < 1


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's own fp8 caches need AVX-512")
def test_fp8_caches_are_as_close_as_those_of_vllm(llama: str, expected: list) -> None:
    errors = {}
    for ours in (False, True):
        with engine(llama, ours=ours, kv_cache_dtype="fp8") as llm:
            found = generate(llm, prompts(), new_tokens=1)
        errors[ours] = (log_probabilities(found) - log_probabilities(expected)[:, :1]).abs().mean()
    assert errors[True] < 1.2 * errors[False]


@pytest.mark.parametrize("block_size", [8, 16, 48])
def test_block_sizes_that_vllm_refuses(llama: str, expected: list, block_size: int) -> None:
    with engine(llama, ours=True, block_size=block_size) as llm:
        expect_same(generate(llm, prompts()), expected)


def test_head_dim_that_vllm_refuses(models: Path) -> None:
    model = save_model(models / "head_dim_24", "LlamaConfig", head_dim=24)
    with engine(model, ours=True) as llm:
        found = tokens_of(generate(llm, prompts()))
    reference = AutoModelForCausalLM.from_pretrained(model)
    for prompt, tokens in zip(prompts(), found, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens


def test_prefix_caching(llama: str, expected: list) -> None:
    with engine(llama, ours=True, block_size=16) as llm:
        generate(llm, prompts())
        again = generate(llm, prompts())
    assert [output.num_cached_tokens for output in again] == [0, 32, 96, 16, 0]
    expect_same(again, expected)


def test_preemption(llama: str, expected: list) -> None:
    # The longest request needs 8 blocks of 16 tokens, all of them together 20.
    with engine(
        llama,
        ours=True,
        block_size=16,
        num_gpu_blocks_override=12,
        max_model_len=160,
        enable_prefix_caching=False,
    ) as llm:
        found = generate(llm, prompts())
        assert metric(llm, "vllm:num_preemptions") > 0
    expect_same(found, expected)


def test_chunked_prefill(llama: str, expected: list) -> None:
    with engine(llama, ours=True, max_num_batched_tokens=24, max_num_seqs=4) as llm:
        expect_same(generate(llm, prompts()), expected)


def test_a_prompt_in_chunks_among_requests_that_decode(llama: str, expected: list) -> None:
    steps = []
    with engine(llama, ours=True, max_num_batched_tokens=24) as llm:
        core = llm.llm_engine
        (layer, *_) = core.vllm_config.compilation_config.static_forward_context.values()
        forward = layer.impl.forward

        def seen(layer, query, key, value, kv_cache, metadata, *args, **kwargs):
            steps.append(metadata.query_start_loc.diff().tolist())
            return forward(layer, query, key, value, kv_cache, metadata, *args, **kwargs)

        layer.impl.forward = seen
        finished = {}
        # The longest prompt comes when the others decode.
        for index in (0, 1, 3, 4):
            core.add_request(str(index), {"prompt_token_ids": prompts()[index]}, sampling())
        for step in range(3 * NEW_TOKENS):
            if step == 6:
                core.add_request("2", {"prompt_token_ids": prompts()[2]}, sampling())
            finished |= {output.request_id: output for output in core.step() if output.finished}
    assert any(max(new) > 1 and sorted(new)[:3] == [1, 1, 1] for new in steps), steps
    expect_same([finished[request] for request in sorted(finished)], expected)


def test_aborted_request(llama: str, expected: list) -> None:
    with engine(llama, ours=True) as llm:
        core = llm.llm_engine
        for index, prompt in enumerate(prompts()):
            core.add_request(str(index), {"prompt_token_ids": prompt}, sampling())
        finished = {}
        for step in range(2 * NEW_TOKENS):
            if step == 7:
                core.abort_request(["2"])
            finished |= {output.request_id: output for output in core.step() if output.finished}
    assert sorted(finished) == ["0", "1", "3", "4"]
    rest = [finished[request] for request in sorted(finished)]
    expect_same(rest, [expected[int(request)] for request in sorted(finished)])


def test_speculation_by_ngrams(llama: str, expected: list) -> None:
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    with engine(llama, ours=True, speculative_config=speculation) as llm:
        found = generate(llm, prompts())
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
    expect_same(found, expected)


def test_compiled_model(llama: str, expected: list) -> None:
    with engine(llama, ours=True, enforce_eager=False, compilation_config={"backend": "eager"}) as llm:
        expect_same(generate(llm, prompts()), expected)


def test_encoder_is_left_to_vllm(models: Path) -> None:
    model = save_model(models / "bert", "BertConfig", type_vocab_size=2, pad_token_id=0)
    inputs = [{"prompt_token_ids": tokens} for tokens in prompts()]
    found = {}
    for ours in (False, True):
        with engine(model, ours=ours, runner="pooling", skip_tokenizer_init=False) as llm:
            found[ours] = torch.tensor([output.outputs.embedding for output in llm.embed(inputs)])
            if ours:
                assert reasons(llm) == {"encoder_only attention"}
    torch.testing.assert_close(found[True], found[False])


def test_connector_is_left_to_vllm(llama: str, expected: list, tmp_path: Path) -> None:
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with engine(llama, ours=True, kv_transfer_config=connector) as llm:
        (reason,) = reasons(llm)
        assert "KV connector" in reason
        expect_same(generate(llm, prompts()), expected)
