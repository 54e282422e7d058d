"""Sequences of a prompt that is kept once: what they hold, and what makes ordinary tensors of it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache

from lean_attention.integrations.transformers import CACHE_PARAMETER, NAME, LeanCache, accelerate
from lean_attention.integrations.transformers.cache_layers import LeanLayer
from lean_attention.integrations.transformers.prompt_pages import (
    PAGE,
    PagedStates,
    equal_lengths,
    pages_of,
)
from tests.integrations.transformers.tiny_models import left_padded, make_model, use

# Tokens of prompts: less than a page, pages and some more, just pages.
LENGTHS = [5, 2 * PAGE + 1, 3 * PAGE]


def layers(prompts: int, tokens: int, repeats: int) -> tuple[LeanLayer, LeanLayer]:
    """A layer whose prompts are kept once, and one with a copy for each row. Values are shorter than keys."""
    states = torch.randn(prompts, 2, tokens, 16), torch.randn(prompts, 2, tokens, 8)
    kept_once, repeated = LeanLayer(), LeanLayer()
    for layer in (kept_once, repeated):
        layer.update(*states)
    kept_once.repeat_prompts(repeats)
    repeated.batch_repeat_interleave(repeats)
    return kept_once, repeated


def step(kept_once: LeanLayer, repeated: LeanLayer, tokens: int) -> None:
    rows = len(repeated.keys)
    states = torch.randn(rows, 2, tokens, 16), torch.randn(rows, 2, tokens, 8)
    for layer in (kept_once, repeated):
        layer.update(*states)


def is_kept_once(layer: LeanLayer) -> bool:
    return pages_of(layer.keys, layer.values) is not None


def assert_alike(layer: LeanLayer, want: LeanLayer) -> None:
    """Looks at a copy, since looking makes ordinary tensors."""
    layer = copy.deepcopy(layer)
    assert layer.get_seq_length() == want.get_seq_length()
    assert layer.get_mask_sizes(3) == want.get_mask_sizes(3)
    assert torch.equal(layer.keys, want.keys) and torch.equal(layer.values, want.values)
    if isinstance(layer.keys, PagedStates):  # a tensor has the strides that these say they have
        assert layer.keys.stride() == layer.keys.whole().stride()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_steps_and_reordered_beams_stay_in_the_pages(mode, tokens: int) -> None:
    """Of one prompt and across prompts, between steps of 1 to 40 tokens; the pool grows meanwhile."""
    with mode():
        ours, want = layers(2, tokens, 3)
        assert_alike(ours, want)
        for i in range(80):
            step(ours, want, int(torch.tensor([1, 1, 2, 13, 40])[torch.randint(5, ())]))
            if i % 2:
                rows = torch.randint(6, (6,))
                for layer in (ours, want):
                    layer.reorder_cache(rows)
            if i % 10 == 0:
                ours = pickle.loads(pickle.dumps(ours)) if i % 20 else copy.deepcopy(ours)
            assert_alike(ours, want)
        assert is_kept_once(ours)


@torch.no_grad()
def test_reordering_copies_the_last_pages_alone() -> None:
    ours, want = layers(1, 3 * PAGE, 4)
    step(ours, want, PAGE + 3)
    before = ours.keys.pages
    ours.reorder_cache(torch.tensor([3, 0, 0, 2]))
    after = ours.keys.pages
    assert after.keys.data_ptr() == before.keys.data_ptr()
    assert after.table[:, :4].tolist() == [before.table[i, :4].tolist() for i in (3, 0, 0, 2)]
    assert torch.equal(after.table[:, 4:], before.table[:, 4:])


CHANGES = {
    "crop": lambda layer: layer.crop(-4),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([5, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "fewer beams": lambda layer: layer.reorder_cache(torch.tensor([4, 1])),
    "zero": lambda layer: layer.values.zero_(),
    "write": lambda layer: layer.keys.__setitem__((0, 1, 3), torch.ones(16)),
    "write to a view": lambda layer: layer.keys[:, :, 2:].mul_(2),
    "replace": lambda layer: setattr(layer, "keys", layer.keys.flip(2)),
    "look": lambda layer: layer.keys + 0,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_pages_cannot_do_is_done_to_ordinary_tensors(change) -> None:
    ours, want = layers(2, 2 * PAGE + 1, 3)
    step(ours, want, 3)
    assert is_kept_once(ours)
    for layer in (ours, want):
        change(layer)
    assert not is_kept_once(ours)
    assert_alike(ours, want)
    for tokens in (1, 40):
        step(ours, want, tokens)
        assert type(ours.keys) is type(ours.values) is torch.Tensor
        assert_alike(ours, want)


@torch.no_grad()
def test_tensors_given_out_do_not_change_with_later_steps() -> None:
    ours, want = layers(1, 2 * PAGE + 1, 3)
    step(ours, want, 3)
    given, expected = ours.keys, want.keys.clone()
    step(ours, want, 30)
    assert torch.equal(given, expected)
    step(ours, want, 1)
    assert is_kept_once(ours)
    assert_alike(ours, want)


@torch.no_grad()
def test_what_looks_past_operations_gets_ordinary_tensors() -> None:
    for look in (lambda x: x.numpy().tolist(), lambda x: x.tolist(), lambda x: list(x.untyped_storage()[:9])):
        ours, want = layers(2, 20, 3)
        assert look(ours.keys) == look(want.keys)
    ours, _ = layers(2, 20, 3)
    address = ours.keys.data_ptr()
    assert address != 0 and address == ours.keys.whole().data_ptr()


@torch.no_grad()
def test_the_default_device_is_not_asked() -> None:
    equal_lengths.cache_clear()
    with torch.device("meta"):
        lengths = equal_lengths(7, 3)
        layer = LeanLayer()
        layer.update(*2 * [torch.zeros(1, 2, 40, 8, device="cpu")])
        layer.repeat_prompts(2)
        layer.update(*2 * [torch.zeros(2, 2, 100, 8, device="cpu")])
    assert lengths.device.type == pages_of(layer.keys, layer.values).table.device.type == "cpu"


@torch.no_grad()
def test_a_reset_layer_begins_anew() -> None:
    ours, _ = layers(1, 2 * PAGE, 3)
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.prompt is None
    keys, values = torch.randn(2, 1, 2, 4, 16)
    assert torch.equal(ours.update(keys, values)[0], keys)


@torch.no_grad()
def test_new_tokens_of_another_kind_go_to_ordinary_tensors() -> None:
    ours, want = layers(1, 2 * PAGE, 3)
    states = torch.randn(3, 2, 1, 16).double(), torch.randn(3, 2, 1, 8).double()
    got = ours.update(*states)
    for a, b in zip(got, want.update(*states), strict=True):
        assert type(a) is torch.Tensor and a.dtype == torch.float64
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("then", ["step", "reorder"])
def test_pages_made_in_inference_mode_are_written_to_without(then: str) -> None:
    with torch.inference_mode():
        ours, want = layers(1, 2 * PAGE + 1, 3)
    if then == "reorder":
        for layer in (ours, want):
            layer.reorder_cache(torch.tensor([2, 0, 0]))
    step(ours, want, 1)
    assert is_kept_once(ours)
    assert_alike(ours, want)


def test_gradients_go_through_a_cache_with_pages() -> None:
    with torch.no_grad():
        ours, want = layers(1, 2 * PAGE, 3)
    gradients = []
    states = torch.randn(3, 2, 1, 16, requires_grad=True), torch.randn(3, 2, 1, 8)
    for layer in (ours, want):
        states[0].grad = None
        keys, values = layer.update(*states)
        (keys.sum(dim=-1) * values.sum(dim=-1)).sum().backward()
        gradients.append(states[0].grad)
    assert torch.equal(*gradients)


def cache_bytes(cache: LeanCache) -> int:
    """Of each storage once, with what is in reserve."""
    saved = io.BytesIO()
    torch.save(cache, saved)
    return saved.tell()


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("beams", [False, True], ids=["samples", "beams"])
@torch.no_grad()
def test_the_prompt_is_kept_once(padding: int, beams: bool) -> None:
    model = accelerate(make_model("llama", max_position_embeddings=2048))
    inputs, sequences, new = left_padded((40 * PAGE - padding, 40 * PAGE)), 8, 20
    got = model.generate(
        **inputs,
        max_new_tokens=new,
        num_return_sequences=sequences,
        num_beams=sequences if beams else 1,
        do_sample=not beams,
        return_dict_in_generate=True,
    )
    cache = getattr(got, CACHE_PARAMETER)
    assert all(is_kept_once(layer) for layer in cache.layers)
    bytes_per_token = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
    reserve = 2 * 40 * PAGE // 8 + 2 * sequences * PAGE
    most = 2 * 40 * PAGE + 2 * sequences * (new + PAGE) + reserve
    held = cache_bytes(cache)
    assert 2 * 40 * PAGE * bytes_per_token < held < most * bytes_per_token + 50_000
    copy_for_each = 2 * sequences * 40 * PAGE * bytes_per_token
    assert held < copy_for_each / 4
    assert cache_bytes(pickle.loads(pickle.dumps(cache))) < 1.05 * held


@pytest.mark.parametrize("kind", ["bloom", "diffllama", "holes"])
@torch.no_grad()
def test_attention_that_reads_no_pages_gets_ordinary_tensors_once(kind: str) -> None:
    """A model with its own, one that changes values before it attends, a mask that is left to sdpa."""
    model = make_model("llama" if kind == "holes" else kind)
    ids = torch.randint(2, 128, (2, 2 * PAGE + 1))
    mask = torch.ones_like(ids)
    if kind == "holes":
        mask[:, 9:12] = 0
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    want = model.generate(ids, attention_mask=mask, **options)
    got = accelerate(model).generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    assert torch.equal(got.sequences, want)
    assert not any(isinstance(each.keys, PagedStates) for each in getattr(got, CACHE_PARAMETER).layers)


def repeated_in(model, ids: torch.Tensor, repeats: int) -> LeanCache:
    """A cache of this model after a step over prompts, each `repeats` times."""
    cache = LeanCache(model.config)
    cache.sequences_per_prompt = repeats
    model(ids.repeat_interleave(repeats, dim=0), use_cache=True, **{CACHE_PARAMETER: cache})
    assert all(is_kept_once(layer) for layer in cache.layers)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_steps_of_several_tokens_read_the_pages(dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    ids, repeats = torch.randint(2, 128, (2, 2 * PAGE + 1)), 3
    steps = [torch.randint(2, 128, (2 * repeats, tokens)) for tokens in (1, 5, 1)]
    dynamic = DynamicCache(config=model.config)
    model(ids.repeat_interleave(repeats, dim=0), **{CACHE_PARAMETER: dynamic})
    want = [model(new, **{CACHE_PARAMETER: dynamic}).logits for new in steps]
    accelerate(model)
    cache = repeated_in(model, ids, repeats)
    got = [model(new, **{CACHE_PARAMETER: cache}).logits for new in steps]
    assert all(is_kept_once(layer) for layer in cache.layers)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@torch.no_grad()
@pytest.mark.slow
def test_compiled_steps_get_ordinary_tensors() -> None:
    torch.compiler.reset()
    model = accelerate(make_model("llama"))
    ids, new = torch.randint(2, 128, (1, 2 * PAGE + 1)), torch.randint(2, 128, (3, 1))
    cache = repeated_in(model, ids, 3)
    compiled = torch.compile(model, backend="eager")
    got = [compiled(new, **{CACHE_PARAMETER: cache}).logits for _ in range(2)]
    assert type(cache.layers[0].keys) is torch.Tensor
    use(model, "eager")
    want = model(torch.cat([ids.expand(3, -1), new, new], dim=1), use_cache=False).logits
    use(model, NAME)
    torch.testing.assert_close(torch.cat(got, dim=1), want[:, -2:], rtol=1e-4, atol=1e-4)
