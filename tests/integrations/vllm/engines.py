"""Tiny random models in vLLM, with this package's attention and with vLLM's own."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from lean_attention.integrations.vllm import register

VOCABULARY = 128
# Tokens that cross blocks of 32 and windows of 16, in prompts and while decoding.
PROMPT_LENGTHS = (3, 40, 100, 17, 1)
NEW_TOKENS = 24

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    # Attention that differs between tokens: the usual 0.02 would hide what a wrong row changes.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def save_model(folder: Path, config_class: str, **options) -> str:
    """A random model of a class of transformers' configs; returns its folder."""
    if not folder.exists():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**{**SIZES, **options})
        auto = AutoModel if "Bert" in config_class else AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager").float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "sinks" in name:
                    parameter.normal_()
        model.save_pretrained(folder)
        words = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return str(folder)


def prompts(seed: int = 1, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@contextmanager
def engine(model: str, ours: bool, **options) -> Iterator[LLM]:
    """vLLM in this process, with this package's attention or with its own."""
    if "numba" in sys.modules:
        # Speculation by n-grams imports it. vLLM puts its CPU kernels into all modules for every engine, and
        # stumbles over one of numba's objects; the kernels are in place since the engine before.
        CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)
    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()
    if ours:
        register()
        assert AttentionBackendEnum.CPU_ATTN.is_overridden()
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "kv_cache_memory_bytes": 1 << 24,
        "disable_log_stats": False,
        **options,
    }
    llm = LLM(model, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def sampling(new_tokens: int = NEW_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0)


def generate(llm: LLM, token_ids: list[list[int]], new_tokens: int = NEW_TOKENS) -> list:
    """vLLM's outputs, of greedy sampling."""
    return llm.generate(
        [{"prompt_token_ids": tokens} for tokens in token_ids], sampling(new_tokens), use_tqdm=False
    )


def tokens_of(outputs: list) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def log_probabilities(outputs: list) -> torch.Tensor:
    return torch.tensor(
        [[next(iter(step.values())).logprob for step in output.outputs[0].logprobs] for output in outputs]
    )


def reasons(llm: LLM) -> set[str | None]:
    """Why layers are left to vLLM; {None}: this package serves all of them."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return {getattr(layer.impl, "reason", "vLLM's own") for layer in layers if isinstance(layer, Attention)}


def metric(llm: LLM, name: str) -> float:
    return sum(found.value for found in llm.get_metrics() if found.name == name)


def expect_same(found: list, expected: list, tolerance: float = 1e-3) -> None:
    assert tokens_of(found) == tokens_of(expected)
    torch.testing.assert_close(log_probabilities(found), log_probabilities(expected), atol=tolerance, rtol=0)
