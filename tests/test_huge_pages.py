"""Huge pages: what Linux is told of a cache's memory, by what it says itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lean_attention
from lean_attention.huge_pages import HUGE_PAGE, MIN_BYTES, VARIABLE
from tests.memory import ENABLED, has_huge_pages, huge_bytes, is_asked_for

BYTES = 64 << 20  # glibc maps so much by itself, so that no other block has its memory


@has_huge_pages
def test_memory_is_huge_from_its_first_write_on():
    cache = torch.empty(BYTES, dtype=torch.uint8)
    assert not is_asked_for(cache)
    assert lean_attention.use_huge_pages(cache, written=False)
    assert is_asked_for(cache)
    written = huge_bytes(cache)
    cache.fill_(3)
    assert huge_bytes(cache) >= written
    assert (cache == 3).all()


@has_huge_pages
def test_memory_that_has_been_written_is_moved():
    cache = torch.arange(BYTES // 8)
    view = cache.view(2, 4, -1)[:, 1:].transpose(1, 2)
    before = huge_bytes(cache)
    moved = lean_attention.use_huge_pages(view)
    assert is_asked_for(cache)
    torch.testing.assert_close(cache, torch.arange(BYTES // 8), rtol=0, atol=0)
    if moved:  # there were huge pages free, and the system is Linux 6.1 or newer
        assert huge_bytes(cache) >= BYTES - 2 * HUGE_PAGE
        assert huge_bytes(cache) > before or "[always]" in ENABLED.read_text()
        assert lean_attention.use_huge_pages(view)


@pytest.mark.parametrize(
    "cache", [torch.empty(0), torch.zeros(MIN_BYTES // 4 - 1), torch.empty(9, device="meta")]
)
@pytest.mark.parametrize("written", [True, False])
def test_nothing_to_do(cache, written):
    assert not lean_attention.use_huge_pages(cache, written=written)


def test_tensors_without_memory() -> None:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not lean_attention.use_huge_pages(torch.empty(BYTES, dtype=torch.uint8))
    with pytest.raises(TypeError, match="use_huge_pages: cache is list; it must be"):
        lean_attention.use_huge_pages([1])


@has_huge_pages
def test_the_variable(monkeypatch):
    cache = torch.empty(BYTES, dtype=torch.uint8)
    monkeypatch.setenv(VARIABLE, "0")
    assert not lean_attention.use_huge_pages(cache, written=False)
    assert not is_asked_for(cache)
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'yes'; it must be 0 or 1"):
        lean_attention.use_huge_pages(cache)
