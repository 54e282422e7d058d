"""Causal-LM families of transformers as tiny random models, in which each kind of layer occurs."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# What the fields of tiny configs are, wherever a family has them and they are numbers.
SIZES: dict[int, str] = {
    128: "vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size ngram_vocab_size_base "
    "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size mamba_d_ssm",
    64: "hidden_size d_model n_embd embedding_dim embedding_size emb_dim word_embed_proj_dim "
    "input_embedding_size output_embedding_size lru_width d_inner router_hidden_size hidden_size_global",
    96: "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size expert_ffn_hidden_size dff dim_ff "
    "n_inner decoder_ffn_dim encoder_ffn_dim feed_forward_size dense_intermediate_size",
    48: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size",
    512: "max_position_embeddings n_positions max_seq_len n_ctx context_length max_target_positions "
    "model_max_length",
    32: "q_lora_rank o_lora_rank",
    16: "head_dim v_head_dim qk_nope_head_dim dim_head d_head swa_head_dim attention_head_size kv_channels "
    "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim kv_lora_rank "
    "hidden_size_per_layer_input prompt_mid_dim pronunciation_embed_dim shape_embed_dim laurel_rank "
    "adapter_rank gated_norm_rank loop_gate_rank ple_embed_dim hc_lowrank state_size ssm_state_size "
    "mamba_d_state mamba_d_head mamba_head_dim",
    10: "sliding_window sliding_window_size attention_window_size local_attention_window_len window_size "
    "attention_chunk_size keep_window_size rel_extent local_attention",
    8: "qk_rope_head_dim index_topk rotary_dim time_step_rank mamba_dt_rank chunk_size mamba_chunk_size "
    "mamba_n_heads mamba_num_heads",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
    "num_encoder_layers num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
    "num_attention_heads_per_layer num_experts num_local_experts n_routed_experts moe_num_experts "
    "index_n_heads zero_expert_num linear_num_heads linear_num_value_heads index_block_size",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k linear_num_key_heads index_topk_blocks attn_layer_period sliding_window_pattern "
    "global_attn_every_n_layers no_rope_layer_interval layer_group_size num_kv_shared_layers",
    1: "n_group n_groups topk_group num_expert_group first_k_dense_replace num_dense_layers",
}  # fmt: skip
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
# Of these also where a family leaves them open.
OPEN = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
ROLES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "is_decoder": True}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SOME_WINDOWS = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 10}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "split_ngram_parts": 4,
    "eos_token_id": 2,
}
GEMMA4 = {
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
# What families need beyond that: where sizes depend on each other, or a default leaves out what published
# models of the family have (a window, sparse layers).
OVERRIDES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 4},
    "blt": {"num_hidden_layers": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 32},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "mixtral": {"sliding_window": 10},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "phi3": {"sliding_window": 10},
    "qwen2": SOME_WINDOWS,
    "qwen2_moe": SOME_WINDOWS,
    "qwen3": SOME_WINDOWS,
    "qwen3_moe": SOME_WINDOWS,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_shape": (16, 32),
        "axial_pos_embds_dim": (16, 48),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def tiny_options(config_class: type, overrides: dict) -> dict:
    """Keyword arguments that make a config tiny."""
    defaults = config_class()
    if dataclasses.is_dataclass(config_class):
        names = [each.name for each in dataclasses.fields(config_class)]
    else:  # before transformers 5
        names = list(inspect.signature(config_class.__init__).parameters)
    values = {}
    for name in names:
        try:
            values[name] = getattr(defaults, name)
        except Exception:  # layers differ in it: it is in the config once for all, and once a layer
            values[name] = vars(defaults).get(name)
    options: dict = {}
    for name, value in values.items():
        if name in ROLES:
            options[name] = ROLES[name]
        elif name in TINY and ((value is None and name in OPEN) or (is_number(value) and value > 0)):
            options[name] = min(TINY[name], TINY[name] if value is None else value)
    if values.get("kv_lora_rank"):  # keys and values are made for every head, the rotated part for itself
        options["num_key_value_heads"] = options["num_attention_heads"]
        if values.get("head_dim") == values.get("qk_rope_head_dim"):
            options["head_dim"] = options["qk_rope_head_dim"]
    options |= per_layer({name: value for name, value in values.items() if name not in overrides}, options)
    parts = {name: getattr(defaults, name, None) for name in getattr(defaults, "sub_configs", None) or {}}
    parts = {name: part for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    for name, part in parts.items():
        own = overrides.get(name, {})
        options[name] = {"model_type": part.model_type, **tiny_options(type(part), own)}
    return options | {name: value for name, value in overrides.items() if name not in parts}


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def per_layer(values: dict, options: dict) -> dict:
    """Lists with an entry a layer, cut to few layers among which every kind of layer is one."""
    name = next((name for name in LAYERS if is_number(values.get(name))), None)
    if name is None:
        return {}
    layers = values[name]
    lists = {
        each: value
        for each, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) == layers > 1
        and list(value) != list(range(layers))
    }
    if not lists:
        return {}
    kinds = [repr([value[i] for value in lists.values()]) for i in range(layers)]
    taken = {kinds.index(kind) for kind in kinds} | {layers - 1}
    for i in range(layers):
        if len(taken) < options[name]:
            taken.add(i)
    cut = {
        each: [TINY[each] if each in TINY and value[i] else value[i] for i in sorted(taken)]
        for each, value in lists.items()
    }
    return {name: len(taken), **cut}


def build(family: str, attention: str) -> PreTrainedModel:
    """A model that reads and writes tokens of its 128, the first of which are special ones."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[family]
    config = config_class(**tiny_options(config_class, OVERRIDES.get(family, {})))
    model_class = AutoModelForCausalLM._model_mapping[config_class]
    # Of some families it is the model of a part.
    parts = [getattr(config, name) for name in getattr(config, "sub_configs", None) or {}]
    config = next((part for part in parts if type(part) is model_class.config_class), config)
    return model_class._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def randomise(model: PreTrainedModel) -> None:
    """Logits that are not all alike; sinks, gates and biases that are not all zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif "sink" in name:
                parameter.normal_()
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=0,
        eos_token_id=None,
        num_beams=1,
        num_return_sequences=1,
    )


def named(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same model as `from_pretrained(..., attn_implementation=attention)` makes it."""
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    other = type(model)._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    for mine, theirs in zip(other.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
    other.generation_config = model.generation_config
    return other
