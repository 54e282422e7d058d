"""Every feature with every other one, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import lean_attention
from tests.helpers import assert_same
from tests.matrix import TOGETHER, FeatureCase, all_pairs, any_case, make_arguments


@pytest.mark.parametrize("case", [*all_pairs(), *TOGETHER], ids=str)
def test_pairs(case: FeatureCase, instruction_set: str) -> None:
    arguments = make_arguments(case)
    assert_same(str(case), arguments, *lean_attention.decode(**arguments))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(case=any_case())
def test_any_combination(case: FeatureCase) -> None:
    arguments = make_arguments(case)
    assert_same(str(case), arguments, *lean_attention.decode(**arguments))


@pytest.mark.parametrize(
    ("kv_heads", "cache", "quantised", "alibi"),
    [
        (10, "tokens_first", None, ""),
        (3, "tokens_first", torch.int8, "heads"),
        (3, "slots", None, "heads"),
        (10, "slots", torch.int8, ""),
        (3, "pool", None, ""),
        (10, "pool", torch.int8, "heads"),
        (10, "paged", None, "heads"),
        (3, "paged", torch.int8, ""),
        (3, "paged_heads_first", None, "heads"),
        (10, "paged_heads_first", torch.int8, ""),
    ],
)
def test_heads_per_pass(kv_heads: int, cache: str, quantised: torch.dtype | None, alibi: str) -> None:
    """Contexts so long that a CPU takes several heads through them together, in ranges that are merged; the
    tokens of a run out of order where no row needs to know a token's place."""
    case = FeatureCase(
        torch.float32,
        quantised,
        "row" if quantised else "",
        cache,
        alibi=alibi,
        softcap=5.0,
        sinks=True,
        leftpad=True,
        group=2,
        dims=(40, 24),
        lens=(8500, 70, 0),
        num_ctas=3,
    )
    arguments = make_arguments(case, kv_heads)
    assert_same(str(case), arguments, *lean_attention.decode(**arguments))
