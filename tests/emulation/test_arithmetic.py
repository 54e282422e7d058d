"""The kernels' own arithmetic: conversions of quantised elements, and the schedule in 32 bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import BF16, E4M3, E5M2, F16, INT8
from tests.emulation import load


def words_with_all_pairs() -> Tensor:
    """Words [n] that hold, at any two of their four bytes, any two bytes; the others are random."""
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    found = []
    for places in itertools.combinations(range(4), 2):
        elements = torch.randint(0, 256, (len(pairs), 4), dtype=torch.uint8)
        elements[:, places] = pairs
        found.append(elements)
    return torch.cat(found).view(torch.int32).flatten()


def assert_same_numbers(words: list[int], want: Tensor) -> None:
    got = torch.tensor(words).int().view(want.dtype).view(want.shape)
    assert torch.equal(got.isnan(), want.isnan())
    different = (got.view(torch.int16) != want.view(torch.int16)) & ~want.isnan()
    assert not different.any(), (got[different][:5], want[different][:5])


@pytest.mark.parametrize("to", [F16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("of", [INT8, E4M3, E5M2], ids=["int8", "e4m3", "e5m2"])
def test_dequantised_numbers_are_those_of_torch(of: torch.dtype, to: torch.dtype) -> None:
    words = words_with_all_pairs()
    unsigned = (words.long() & 0xFFFFFFFF).tolist()
    want = words.view(of).view(-1, 4).to(to)
    assert_same_numbers(load().dequantise(unsigned, str(of).removeprefix("torch."), to == BF16), want)
    if (of, to) == (E4M3, F16):
        assert_same_numbers(load().e4m3_to_fp16_by_integers(unsigned), want)


LARGEST = 2**31 - 1
powers = st.builds(lambda exponent, more: 2**exponent + more, st.integers(0, 31), st.integers(-2, 2))
numbers = st.one_of(st.integers(0, LARGEST), powers.filter(lambda n: 0 <= n <= LARGEST))


@settings(max_examples=1000, deadline=None)
@given(numbers, numbers.filter(bool), st.integers(-1, 1))
@example(LARGEST, 1, 0)
@example(LARGEST, LARGEST, 0)
@example(LARGEST, 7, 0)
def test_division_by_multiplication(n: int, divisor: int, more: int) -> None:
    """Of any number, and of multiples of the divisor and their neighbours."""
    divide = load().divide
    assert divide(n, divisor) == n // divisor
    near = min(max(n // divisor * divisor + more, 0), LARGEST)
    assert divide(near, divisor) == near // divisor


# Kernels bring lengths into range, 2^30 tokens at most, and left padding to what int32 holds.
tokens = st.one_of(st.integers(0, 40), st.integers(0, 3000), st.integers(2**30 - 3, 2**30))
paddings = st.one_of(st.just(0), st.integers(0, 200), st.just(LARGEST))
windows = st.one_of(st.integers(-1, 300), st.integers(2**30 - 2, 2**30 + 2), st.just(2**40))


@settings(max_examples=1000, deadline=None)
@given(
    lengths=st.lists(st.tuples(tokens, paddings, st.integers(0, 40)), min_size=1, max_size=6).filter(
        lambda lengths: any(q_len for _, _, q_len in lengths)
    ),
    num_ctas=st.integers(1, 40),
    num_kv_heads=st.integers(1, 5),
    group=st.integers(1, 9),
    rows_per_block=st.sampled_from([16, 32]),
    tile_tokens=st.sampled_from([64, 128, 256]),
    window_left=windows,
    window_right=windows,
)
def test_the_schedule_in_32_bits_is_that_in_64(**arguments) -> None:
    try:
        narrow, wide = load().segments(**arguments)
    except ValueError:
        reject()  # more LeanTiles than 32 bits count
    assert narrow == wide
