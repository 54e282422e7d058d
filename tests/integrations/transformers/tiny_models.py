"""Models of transformers with small random weights, and what the tests do with them."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from transformers.masking_utils import create_causal_mask

import lean_attention

# transformers 5.24 has given the models' parameter a new name.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 12},
    "gemma2": {"head_dim": 16, "sliding_window": 12, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 12},
    "gpt_oss": {"head_dim": 16, "sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
# Families of the edges: encoders, encoder-decoders, sparse attention.
SPARSE = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
GEMMA2 = {**SMALL, **MODELS["gemma2"], "query_pre_attn_scalar": 16}
OTHERS = {
    "bert": {},
    "bigbird_pegasus": {
        "d_model": 64,
        "decoder_layers": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 96,
        "is_encoder_decoder": False,
    },
    "bloom": {"n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 128},
    "deepseek_v32": SPARSE,
    "diffllama": {},
    "glm_moe_dsa": SPARSE,
    "inkling2_text": {
        "unpadded_vocab_size": 128,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "head_dim": 16,
        "swa_head_dim": 16,
        "sliding_window_size": 12,
        "rel_extent": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "t5gemma": {"encoder": GEMMA2, "decoder": GEMMA2},
}
CLASSES = {
    "bert": transformers.AutoModelForMaskedLM,
    "t5gemma": transformers.AutoModelForSeq2SeqLM,
}


def make_model(kind: str, dtype: torch.dtype = torch.float32, **changes):
    """A small random model of a family, or skips where this transformers has it not."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **{**MODELS, **OTHERS}[kind], **changes})
    auto = CLASSES.get(kind, transformers.AutoModelForCausalLM)
    model = auto.from_config(config, attn_implementation="eager").to(dtype).eval()
    # Random logits that are not all alike, and sinks that are not all zero.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def use(model, attention: str) -> None:
    model.set_attn_implementation(attention)


def left_padded(lengths: tuple[int, ...]) -> dict:
    longest = max(lengths)
    ids, mask = (
        torch.randint(2, 128, (len(lengths), longest)),
        torch.ones(len(lengths), longest, dtype=torch.long),
    )
    for b, length in enumerate(lengths):
        ids[b, : longest - length] = 0
        mask[b, : longest - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs: dict, **options):
    return model.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list:
    calls = []
    decode = lean_attention.decode
    monkeypatch.setattr(lean_attention, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    return calls
