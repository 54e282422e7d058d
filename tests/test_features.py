"""Every feature with every other one, against the definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

import lean_attention
from tests.helpers import assert_same
from tests.matrix import TOGETHER, FeatureCase, all_pairs, any_case, make_arguments


@pytest.mark.parametrize("case", [*all_pairs(), *TOGETHER], ids=str)
def test_pairs(case: FeatureCase, instruction_set: str) -> None:
    arguments = make_arguments(case)
    assert_same(str(case), arguments, *lean_attention.decode(**arguments))


@settings(max_examples=150, deadline=None)
@given(case=any_case())
def test_any_combination(case: FeatureCase) -> None:
    arguments = make_arguments(case)
    assert_same(str(case), arguments, *lean_attention.decode(**arguments))
