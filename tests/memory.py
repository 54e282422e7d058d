"""What Linux says of the memory of a tensor."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import Tensor

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

has_huge_pages = pytest.mark.skipif(
    sys.platform != "linux" or not ENABLED.exists() or "[never]" in ENABLED.read_text(),
    reason="this system has no huge pages",
)


def is_asked_for(tensor: Tensor) -> bool:
    """Whether huge pages are, in the middle of its storage."""
    return " hg" in re.search(r"^VmFlags:.*$", _mapping(tensor), flags=re.M)[0]


def huge_bytes(tensor: Tensor) -> int:
    return int(re.search(r"^AnonHugePages: +(\d+) kB$", _mapping(tensor), flags=re.M)[1]) * 1024


def _mapping(tensor: Tensor) -> str:
    """What /proc/self/smaps says of the memory in the middle of its storage."""
    middle = tensor.untyped_storage().data_ptr() + tensor.untyped_storage().nbytes() // 2
    for text in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M):
        range_ = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", text)
        if range_ and int(range_[1], 16) <= middle < int(range_[2], 16):
            return text
    raise AssertionError("the tensor's memory is not mapped")
