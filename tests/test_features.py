"""Every feature with every other one, against the definition."""

from __future__ import annotations

import pytest

import lean_attention
from tests.helpers import assert_same
from tests.matrix import FeatureCase, all_pairs, make_arguments


@pytest.mark.parametrize("case", all_pairs(), ids=str)
def test_pairs(case: FeatureCase, instruction_set: str) -> None:
    arguments = make_arguments(case)
    assert_same(str(case), arguments, *lean_attention.decode(**arguments))
