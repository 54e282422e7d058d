"""What the machine can multiply, as benchmarks count it."""

from __future__ import annotations

import pytest

from lean_attention._core import tools
from lean_attention.tools.roofline import fma_rate
from tests.cases import DTYPES


def test_products_are_counted(instruction_set: str) -> None:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        assert tools.fma_loop(name, 30) == 3 * tools.fma_loop(name, 10) > 0
        assert fma_rate(dtype, rows=64, seconds=1e-4) > 0
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got int8"):
        tools.fma_loop("int8", 1)
