"""A layer of vLLM, without a model: what is written, and attention over it, against plain PyTorch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lean_attention import reference
from lean_attention.integrations.vllm.backend import (
    Attention,
    CPUAttentionMetadata,
    LeanAttentionImpl,
    LeanAttentionMetadataBuilder,
)

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 24, 8
BLOCKS = 12
FP8 = {None: None, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def config(dtype: torch.dtype = torch.float32, **options) -> SimpleNamespace:
    """What of vLLM's configuration a layer looks at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype, is_diffusion=False),
        attention_config=SimpleNamespace(use_non_causal=False),
        kv_transfer_config=None,
        compilation_config=SimpleNamespace(),
        **options,
    )


def implementation(monkeypatch: pytest.MonkeyPatch, configuration=None, **options) -> LeanAttentionImpl:
    configuration = configuration or config()
    for module in ("vllm.v1.attention.backends.cpu_attn", "lean_attention.integrations.vllm.backend"):
        monkeypatch.setattr(f"{module}.get_current_vllm_config", lambda: configuration)
    arguments = {
        "num_heads": HEADS,
        "head_size": HEAD_DIM,
        "scale": 0.3,
        "num_kv_heads": KV_HEADS,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    return LeanAttentionImpl(**{**arguments, **options})


def step(dtype: torch.dtype = torch.float32) -> tuple[CPUAttentionMetadata, Tensor]:
    """Sequences of 13, 30 and 7 tokens with 1, 5 and 7 new ones; their blocks lie in no order."""
    tables = torch.tensor([[3, 7, 99, -5], [1, 0, 5, 8], [11, 99, 99, 99]], dtype=torch.int32)
    lens, new = (13, 30, 7), (1, 5, 7)
    slots = [
        int(table[t // BLOCK]) * BLOCK + t % BLOCK
        for table, n, added in zip(tables, lens, new, strict=True)
        for t in range(n - added, n)
    ]
    metadata = CPUAttentionMetadata(
        num_actual_tokens=13,
        max_query_len=7,
        query_start_loc=torch.tensor([0, 1, 6, 13], dtype=torch.int32),
        max_seq_len=30,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_table=tables,
        slot_mapping=torch.tensor(slots),
        scheduler_metadata=None,
    )
    return metadata, torch.randn(13, HEADS, HEAD_DIM, dtype=dtype)


def rows_in(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, [blocks, block, kv_heads, head_dim], by the layout that vLLM documents."""
    rows = cache.reshape(BLOCKS, KV_HEADS, 2, BLOCK, HEAD_DIM)
    return rows[:, :, 0].transpose(1, 2), rows[:, :, 1].transpose(1, 2)


@pytest.mark.parametrize("cache", FP8)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 6},
        {"logits_soft_cap": 2.0},
        {"alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
        {"sinks": torch.tensor([0.5, 1.5, -1.0, 2.0], dtype=torch.bfloat16)},
        {"sliding_window": 9, "sinks": torch.tensor([0.5, 1.5, -1.0, 2.0]), "logits_soft_cap": 3.0},
    ],
)
def test_step(monkeypatch: pytest.MonkeyPatch, cache: str | None, options: dict) -> None:
    impl = implementation(monkeypatch, kv_cache_dtype=cache or "auto", **options)
    assert impl.reason is None
    layer = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(2.0))
    metadata, query = step()
    key, value = (torch.randn(14, KV_HEADS, HEAD_DIM) * 3 for _ in range(2))
    key[0, 0, 0] = 1e6  # beyond fp8
    if cache is None:
        kv_cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM)
        typed = kv_cache
    else:
        kv_cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM).to(FP8[cache]).view(torch.uint8)
        typed = kv_cache.view(FP8[cache])
    before = kv_cache.clone()

    # The last token is padding, and goes nowhere.
    slots = torch.cat([metadata.slot_mapping, torch.tensor([-1])])
    impl.do_kv_cache_update(layer, key, value, kv_cache, slots)

    keys, values = rows_in(typed)
    place = metadata.slot_mapping // BLOCK, metadata.slot_mapping % BLOCK
    for rows, given, scale in ((keys, key, 0.5), (values, value, 2.0)):
        wanted = given[:13]
        if cache is not None:
            limit = torch.finfo(FP8[cache]).max
            wanted = (wanted / scale).clamp(-limit, limit).to(FP8[cache]).float()
        assert torch.equal(rows[place].float(), wanted)
    untouched = torch.ones(BLOCKS, BLOCK, dtype=torch.bool)
    untouched[place] = False
    for now, then in zip(rows_in(kv_cache), rows_in(before), strict=True):
        assert torch.equal(now[untouched], then[untouched])

    output = torch.full((14, HEADS, HEAD_DIM), 7.0)
    impl.forward(layer, query, key, value, kv_cache, metadata, output)

    expected, _ = reference.decode(
        query,
        keys.float() * (0.5 if cache else 1),
        values.float() * (2.0 if cache else 1),
        metadata.seq_lens,
        metadata.block_table,
        cu_seqlens_q=metadata.query_start_loc,
        scale=0.3,
        window_left=options.get("sliding_window", 0) - 1,
        softcap=options.get("logits_soft_cap", 0.0),
        alibi_slopes=None if "alibi_slopes" not in options else torch.tensor(options["alibi_slopes"]),
        sinks=None if "sinks" not in options else options["sinks"].float(),
    )
    torch.testing.assert_close(output[:13], expected.float(), atol=1e-4, rtol=1e-4)
    assert (output[13] == 7.0).all()


def test_each_cache_asks_for_huge_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr("lean_attention.use_huge_pages", lambda cache: asked.append(cache) or True)
    impl = implementation(monkeypatch)
    caches = [torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM) for _ in range(2)]
    metadata, query = step()
    key = torch.zeros(13, KV_HEADS, HEAD_DIM)
    for cache in (caches[0], caches[0], caches[1]):
        impl.forward(SimpleNamespace(), query, key, key, cache, metadata, torch.empty_like(query))
    assert [cache is given for cache, given in zip(asked, caches, strict=True)] == [True, True]


def test_output_that_is_to_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = implementation(monkeypatch)
    with pytest.raises(NotImplementedError, match="output quantization"):
        impl.forward(None, None, None, None, torch.empty(0), None, None, torch.ones(1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head_size": 20}, "a head_dim of 20"),
        ({"head_size": 520}, "a head_dim of 520"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
        ({"kv_cache_dtype": "bfloat16"}, "a bfloat16 cache and torch.float32"),
    ],
)
def test_layers_left_to_vllm(monkeypatch: pytest.MonkeyPatch, options: dict, reason: str) -> None:
    assert implementation(monkeypatch, **options).reason == reason


def builder(impl: LeanAttentionImpl, **spec) -> LeanAttentionMetadataBuilder:
    layer = Attention.__new__(Attention)
    layer.__dict__["impl"] = impl
    configuration = config()
    configuration.compilation_config.static_forward_context = {"layer": layer}
    return LeanAttentionMetadataBuilder(
        SimpleNamespace(**spec), ["layer"], configuration, torch.device("cpu")
    )


def test_non_causal_layers_are_left_to_vllm_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = implementation(monkeypatch)
    with pytest.raises(ValueError, match="a block size of 16 does not go with layers that are left"):
        builder(impl, block_size=16, non_causal=True)
    assert impl.reason == "attention that is not causal"


def test_a_step_that_is_not_causal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = builder(implementation(monkeypatch), block_size=16)
    with pytest.raises(NotImplementedError, match="LEAN_ATTENTION_VLLM=0"):
        made.build(0, SimpleNamespace(causal=torch.tensor([True, False])))
