"""`LeanCache` does what a `DynamicCache` does, and copies no old token; `accelerate` gives it to a model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from lean_attention.integrations.transformers import (
    CACHE_PARAMETER,
    NAME,
    LeanCache,
    accelerate,
    cache_layers,
)
from lean_attention.integrations.transformers.cache_layers import RESERVE_SHARE, RESERVE_TOKENS
from tests.integrations.transformers.tiny_models import (
    SMALL,
    count_decodes,
    generate,
    left_padded,
    make_model,
    use,
)
from tests.memory import has_huge_pages, is_asked_for

FAMILIES = ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v32", "lfm2", "t5gemma"]
WINDOW = 12
QUANTISED = ["int8", "float8_e4m3fn"]


def config_of(window: int = WINDOW):
    """Two layers, one of sliding-window and one of full attention."""
    return transformers.AutoConfig.for_model(
        "gemma3_text",
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    )


def caches(*args) -> tuple[LeanCache, DynamicCache]:
    config = config_of(*args)
    return LeanCache(config), DynamicCache(config=config)


def assert_alike(lean: LeanCache, dynamic: DynamicCache) -> None:
    assert lean.get_seq_length() == dynamic.get_seq_length()
    for a, b in zip(lean.layers, dynamic.layers, strict=True):
        assert a.get_mask_sizes(3) == b.get_mask_sizes(3)
        if b.is_initialized and b.keys.numel():
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def step(lean: LeanCache, dynamic: DynamicCache, tokens: int, batch: int = 2) -> None:
    for layer in range(2):
        k, v = torch.randn(2, batch, 2, tokens, 8)
        for a, b in zip(lean.update(k, v, layer), dynamic.update(k, v, layer), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("record_past", [False, True])
def test_any_sequence_of_calls_gives_what_a_dynamic_cache_gives(mode, record_past: bool) -> None:
    """Steps of 1 to 400 tokens, and between them everything that a cache can be asked to do."""
    lean, dynamic = caches()
    batch = 2
    if record_past:
        lean.activate_past_recording()
        dynamic.activate_past_recording()
    with mode():
        for _ in range(60):
            step(lean, dynamic, int(torch.tensor([1, 1, 1, 2, 7, 13, 400])[torch.randint(7, ())]), batch)
            call = int(torch.randint(9, ()))
            for cache in (lean, dynamic):
                if call == 0 and record_past:
                    cache.crop(-1)
                elif call == 1:
                    cache.reorder_cache(torch.arange(batch).flip(0))
                elif call == 2 and batch < 8:
                    cache.batch_repeat_interleave(2)
                elif call == 3 and batch > 2:
                    cache.batch_select_indices(torch.arange(0, batch, 2))
                elif call == 4 and record_past:
                    cache.crop(0)
            batch = batch * 2 if call == 2 and batch < 8 else len(range(0, batch, 2)) if call == 3 else batch
            batch = max(batch, 1)
            if call == 3 and batch == 1:
                batch = 2
                lean.reset()
                dynamic.reset()
                assert lean.get_seq_length() == 0
            if call == 5:
                lean, dynamic = copy.deepcopy(lean), copy.deepcopy(dynamic)
            assert_alike(lean, dynamic)


def stored_and_read(x: torch.Tensor, kv_cache: str) -> torch.Tensor:
    """What a row is once it was stored: a byte per number, and a scale in float32."""
    largest = 127.0 if kv_cache == "int8" else 448.0
    scale = x.abs().amax(dim=-1, keepdim=True) / largest
    rows = torch.where(scale > 0, x / scale, 0.0)
    rows = rows.round() if kv_cache == "int8" else rows.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return rows * scale


@pytest.mark.parametrize("kv_cache", QUANTISED)
@pytest.mark.parametrize("record_past", [False, True])
@torch.no_grad()
def test_quantised_caches_hold_what_a_dynamic_cache_holds(kv_cache: str, record_past: bool) -> None:
    """Older tokens as stored, those of the call as they are, whatever was done to the cache between."""
    lean, dynamic = LeanCache(config_of(), kv_cache), DynamicCache(config=config_of())
    if record_past:
        lean.activate_past_recording()
        dynamic.activate_past_recording()
    batch = 2
    for _ in range(40):
        tokens = int(torch.tensor([1, 1, 2, 13, 400])[torch.randint(5, ())])
        for layer in range(2):
            k, v = torch.randn(2, batch, 2, tokens, 8)
            for ours, theirs in zip(lean.update(k, v, layer), dynamic.update(k, v, layer), strict=True):
                ours = ours + 0  # any operation makes a plain tensor of it
                assert ours.shape == theirs.shape and type(ours) is torch.Tensor
                older = stored_and_read(theirs[:, :, :-tokens], kv_cache)
                torch.testing.assert_close(ours[:, :, :-tokens], older, rtol=1e-6, atol=0)
                assert torch.equal(ours[:, :, -tokens:], theirs[:, :, -tokens:])
        call = int(torch.randint(7, ()))
        for cache in (lean, dynamic):
            if call == 0 and record_past:
                cache.crop(-1)
            elif call == 1:
                cache.reorder_cache(torch.arange(batch).flip(0))
            elif call == 2 and batch == 2:
                cache.batch_repeat_interleave(2)
            elif call == 3 and batch == 4:
                cache.batch_select_indices(torch.tensor([3, 0]))
            elif call == 4:
                cache.reset()
        batch = 4 if call == 2 else 2 if call == 3 else batch
        if call == 4:
            batch = 2
        if call == 5:
            lean, dynamic = pickle.loads(pickle.dumps(lean)), copy.deepcopy(dynamic)
        assert lean.get_seq_length() == dynamic.get_seq_length()
        for (k, v, *_), layer in zip(lean, dynamic.layers, strict=True):
            if layer.is_initialized and layer.keys.numel():
                torch.testing.assert_close(k, stored_and_read(layer.keys, kv_cache), rtol=1e-6, atol=0)
                torch.testing.assert_close(v, stored_and_read(layer.values, kv_cache), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kv_cache", QUANTISED)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss", "bloom", "diffllama"])
@torch.no_grad()
def test_attention_reads_quantised_caches_as_eager_does(
    kind: str, kv_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager attention is given dequantised keys and values of the same cache."""
    model = make_model(kind)
    ids, mask = left_padded((40, 17)).values()
    steps = [torch.randint(2, 128, (2, tokens)) for tokens in (1, 1, 5, 1, 40, 1)]
    logits = []
    calls = count_decodes(monkeypatch)
    for attention in ("eager", NAME) if kind != "bloom" else ("eager", "eager"):
        use(model, attention)
        cache, seen = LeanCache(model.config, kv_cache), mask
        results = [model(ids, attention_mask=seen, **{CACHE_PARAMETER: cache}).logits[:, -1]]
        for new in steps:
            seen = torch.cat([seen, torch.ones_like(new)], dim=1)
            results.append(model(new, attention_mask=seen, **{CACHE_PARAMETER: cache}).logits[:, -1])
        logits.append(torch.stack(results))
    # A difference of rounding can round a number to its neighbour when it is stored.
    assert (logits[0] - logits[1]).abs().max() <= 1e-2 * logits[0].abs().max()
    if kind not in ("bloom", "diffllama"):  # attention of its own; values that are transformed first
        assert len(calls) >= 2 * 5 * SMALL["num_hidden_layers"]


@pytest.mark.parametrize("kv_cache", QUANTISED)
@torch.no_grad()
def test_generate_with_a_quantised_cache(kv_cache: str) -> None:
    model, inputs = make_model("llama"), left_padded((40, 17, 1))
    want = generate(model, inputs)
    accelerate(model)
    accelerate(model, kv_cache=kv_cache)
    got = generate(model, inputs)
    cache = getattr(got, CACHE_PARAMETER)
    assert cache.kv_cache == kv_cache and cache.layers[0].keys.dtype == torch.int8
    assert type(getattr(model(**inputs, use_cache=True), CACHE_PARAMETER)) is LeanCache
    error = (got.logits[1] - want.logits[1]).abs().max() / want.logits[1].abs().max()
    assert 0 < error < {"int8": 0.1, "float8_e4m3fn": 0.3}[kv_cache]


@torch.no_grad()
def test_cropping_below_the_window() -> None:
    lean, dynamic = caches(100)
    for tokens in (20, 30):
        step(lean, dynamic, tokens)
        for cache in (lean, dynamic):
            cache.crop(-5)
        assert_alike(lean, dynamic)


@torch.no_grad()
def test_copies_share_nothing_with_the_original() -> None:
    lean, _ = caches()
    prefix = torch.randn(2, 1, 2, 40, 8)
    for layer in range(2):
        lean.update(*prefix, layer)
    saved = io.BytesIO()
    torch.save(lean, saved)
    saved.seek(0)
    others = [copy.deepcopy(lean), pickle.loads(pickle.dumps(lean)), torch.load(saved, weights_only=False)]
    tokens = [torch.full((1, 2, 1, 8), float(n)) for n in range(4)]
    ours = [cache.update(token, token, 1)[0] for cache, token in zip([lean, *others], tokens, strict=True)]
    for keys, token in zip(ours, tokens, strict=True):
        assert torch.equal(keys[:, :, -1:], token) and torch.equal(keys[:, :, :-1], prefix[0])


@pytest.mark.parametrize("tokens", [1, 1000, 5000])
@torch.no_grad()
def test_the_reserve_is_an_eighth_or_256_tokens(tokens: int) -> None:
    lean, _ = caches()
    for new in (tokens, 1):
        for layer in range(2):
            lean.update(*torch.randn(2, 1, 2, new, 8), layer)
    for layer in lean.layers:
        held = layer.keys.shape[2]
        room = layer.keys.untyped_storage().nbytes() // (2 * 8 * 4) - held
        assert room <= max(RESERVE_TOKENS, held // RESERVE_SHARE) + WINDOW


@torch.no_grad()
def test_a_cache_filled_in_inference_mode_goes_on_without() -> None:
    lean, dynamic = caches()
    with torch.inference_mode():
        step(lean, dynamic, 20)
    step(lean, dynamic, 1)
    assert_alike(lean, dynamic)


def test_gradients_go_through_the_cache() -> None:
    lean, dynamic = caches()
    gradients = []
    k = torch.randn(1, 2, 5, 8, requires_grad=True)
    for cache in (lean, dynamic):
        k.grad = None
        cache.update(k, k, 1)
        keys, values = cache.update(2 * k, k, 1)
        (keys * values).sum().backward()
        gradients.append(k.grad)
    assert torch.equal(*gradients)


class CopiedBytes(TorchDispatchMode):
    """The bytes that copying operators write while it is active, in tensors of more than a token."""

    COPIES = (
        "cat",
        "copy_",
        "clone",
        "index_select",
        "_to_copy",
        "index",
        "repeat_interleave",
        "_reshape_copy",
    )

    def __init__(self, token_numel: int) -> None:
        super().__init__()
        self.token_numel, self.bytes = token_numel, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.COPIES and out.numel() > self.token_numel:
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@torch.inference_mode()
def test_no_old_token_is_copied_at_a_step(kind: str) -> None:
    """Growth apart: with 256 tokens of reserve at the least, these steps have none."""
    model = accelerate(make_model(kind))
    ids = torch.randint(2, 128, (1, 300))
    heads = model.config.num_key_value_heads * getattr(model.config, "head_dim", 16)
    copied = {}
    for cache in (LeanCache(model.config), DynamicCache(config=model.config)):
        model(ids, **{CACHE_PARAMETER: cache})
        model(ids[:, :1], **{CACHE_PARAMETER: cache})
        with CopiedBytes(8 * max(heads, 128)) as count:
            model(ids[:, :1], **{CACHE_PARAMETER: cache})
        copied[type(cache)] = count.bytes
    assert copied[LeanCache] == 0
    assert copied[DynamicCache] > 300 * heads * 4  # the count sees what it is to see


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_generate_gives_eagers_tokens_and_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_model(kind), left_padded((40, 17, 1))
    want = generate(model, inputs)
    accelerate(model)
    calls = count_decodes(monkeypatch)
    got = generate(model, inputs)
    assert calls or kind == "deepseek_v32"  # which chooses tokens, as no mask of the op's can say
    cache = getattr(got, CACHE_PARAMETER)
    assert isinstance(getattr(cache, "self_attention_cache", cache), LeanCache)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"assistant": "qwen2"},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=lambda options: "-".join(options),
)
@torch.no_grad()
def test_modes_of_generation(kind: str, options: dict) -> None:
    model, inputs = make_model(kind), left_padded((30,))
    options = dict(options)
    if assistant := options.pop("assistant", None):
        options["assistant_model"] = make_model(assistant)
    want = model.generate(**inputs, max_new_tokens=20, do_sample=False, **options)
    accelerate(model)
    if assistant:
        accelerate(options["assistant_model"])
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False, **options), want)


@torch.no_grad()
def test_a_prefix_is_read_once_and_used_again() -> None:
    model = make_model("gemma3_text")
    prefix, ends = torch.randint(2, 128, (1, 40)), [torch.randint(2, 128, (1, n)) for n in (3, 8)]
    prompts = [torch.cat([prefix, end], dim=1) for end in ends]
    want = [model.generate(prompt, max_new_tokens=10, do_sample=False) for prompt in prompts]
    accelerate(model)
    cache = getattr(model(prefix, use_cache=True), CACHE_PARAMETER)
    assert isinstance(cache, LeanCache)
    for prompt, tokens in zip(prompts, want, strict=True):
        own = {CACHE_PARAMETER: copy.deepcopy(cache)}
        assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False, **own), tokens)


def test_accelerate_is_of_one_model_and_can_be_undone() -> None:
    model, other = make_model("llama"), make_model("llama")
    inputs = left_padded((9, 5))
    accelerate(accelerate(model))
    assert model.config._attn_implementation == NAME and other.config._attn_implementation == "eager"
    with torch.no_grad():
        assert type(getattr(model(**inputs, use_cache=True), CACHE_PARAMETER)) is LeanCache
        assert type(getattr(other(**inputs, use_cache=True), CACHE_PARAMETER)) is DynamicCache
        accelerate(model, kv_cache=None)
        assert model.config._attn_implementation == "eager"
        assert type(getattr(model(**inputs, use_cache=True), CACHE_PARAMETER)) is DynamicCache
        assert type(getattr(generate(model, inputs), CACHE_PARAMETER)) is DynamicCache
    assert not model.model._forward_pre_hooks and "_prepare_cache_for_generation" not in model.__dict__
    accelerate(model, kv_cache=None)  # nothing to undo


@torch.no_grad()
def test_accelerated_models_are_copied_pickled_and_saved(tmp_path) -> None:
    model, inputs = accelerate(make_model("llama")), left_padded((9, 5))
    want = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config._attn_implementation != NAME
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), accelerate(again)):
        assert other._prepare_cache_for_generation._model is other
        got = generate(other, inputs)
        assert isinstance(getattr(got, CACHE_PARAMETER), LeanCache)
        assert torch.equal(got.sequences[:, : want.shape[1]], want)


def test_models_without_attention_and_unknown_caches_are_refused() -> None:
    config = transformers.AutoConfig.for_model("mamba", vocab_size=128, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="MambaForCausalLM has no attention layers"):
        accelerate(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(
        ValueError, match=r"kv_cache is 'int3'; it must be one of 'auto', 'int8', 'float8_e4m3fn'"
    ):
        accelerate(make_model("llama"), kv_cache="int3")


@torch.no_grad()
def test_families_with_attention_of_their_own_get_the_cache_and_are_told(said: list[str]) -> None:
    config = transformers.AutoConfig.for_model("bloom", vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inputs = left_padded((9, 4))
    want = generate(model, inputs)
    got = generate(accelerate(model), inputs)
    assert torch.equal(got.sequences, want.sequences)
    assert isinstance(getattr(got, CACHE_PARAMETER), LeanCache)
    assert any("BloomForCausalLM has an attention of its own" in message for message in said)


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_step_is_right() -> None:
    torch.compiler.reset()
    model = accelerate(make_model("llama"))
    ids = torch.randint(2, 128, (1, 20))
    use(model, "eager")
    want = model(ids, use_cache=False).logits[:, -1]
    use(model, NAME)
    cache = LeanCache(model.config)
    model(ids[:, :-1], **{CACHE_PARAMETER: cache})
    got = torch.compile(model, backend="eager")(ids[:, -1:], **{CACHE_PARAMETER: cache}).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@has_huge_pages
@pytest.mark.parametrize("kv_cache", ["auto", *QUANTISED])
def test_long_caches_ask_for_huge_pages(kv_cache: str) -> None:
    cache = LeanCache(config_of(), kv_cache)
    tokens = torch.zeros(1, 2, 1 << 19, 8, dtype=torch.bfloat16)
    cache.update(tokens, tokens, 1)
    assert is_asked_for(cache.layers[1]._reserves["keys"])
    assert is_asked_for(cache.layers[1]._reserves["values"])


def test_wide_caches_of_few_tokens_ask_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of their reserves' memory is room, which huge pages would take."""
    asked: list[torch.Size] = []
    monkeypatch.setattr(cache_layers, "use_huge_pages", lambda reserve, written: asked.append(reserve.shape))
    for tokens in (2000, 2100):
        cache = LeanCache(config_of())
        cache.update(*2 * [torch.zeros(1, 2, tokens, 8)], 1)
    assert asked == 2 * [(1, 2, 2100 + 2100 // RESERVE_SHARE, 8)]


@has_huge_pages
def test_pages_of_a_long_prompt_ask_for_huge_pages() -> None:
    cache = LeanCache(config_of())
    tokens = torch.zeros(1, 2, 1 << 18, 8, dtype=torch.bfloat16)
    cache.update(tokens, tokens, 1)
    cache.sequences_per_prompt = 2
    cache.repeat_prompts()
    pages = cache.layers[1].keys.pages
    assert is_asked_for(pages.keys) and is_asked_for(pages.values)
    more = pages.append(*2 * [torch.zeros(2, 2, 1 << 17, 8, dtype=torch.bfloat16)])
    assert more.keys.data_ptr() != pages.keys.data_ptr()
    assert is_asked_for(more.keys) and is_asked_for(more.values)
