"""Huge pages: memory pages of 2 MB, of which a core looks up fewer than of those of 4 KB."""

from __future__ import annotations

import ctypes
import os
import sys

from torch import Tensor

VARIABLE = "LEAN_ATTENTION_HUGE_PAGES"
HUGE_PAGE = 2 << 20
MIN_BYTES = 2 * HUGE_PAGE  # in less there may be no whole one
# Of madvise(2); the second one needs Linux 6.1.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_huge_pages(cache: Tensor, written: bool = True) -> bool:
    """Asks Linux to keep a KV cache in huge pages.

    A core that reads a cache from memory waits for a walk of the page tables at every memory page, long on
    virtual machines. Where the system gives huge pages only to who asks for them ("[madvise]" in
    ``/sys/kernel/mm/transparent_hugepage/enabled``, as on Ubuntu), PyTorch's tensors have pages of 4 KB. The
    caches that this package makes ask; for those of your own, call this once when they are allocated.

    Args:
        cache: a tensor on the CPU, of any dtype and strides. All memory of its storage is meant.
        written: it has been written to, as by ``torch.zeros``, and is moved now, which takes about as long as
            copying it. False, for ``torch.empty``: each page is huge from its first write on.

    Returns:
        Whether Linux agreed. False where there is nothing to do or no way: another system, a GPU's memory,
        under 4 MB, ``LEAN_ATTENTION_HUGE_PAGES=0``, no huge pages free, or `written` and Linux before 6.1.
    """
    if not isinstance(cache, Tensor):
        raise TypeError(f"use_huge_pages: cache is {type(cache).__name__}; it must be a torch.Tensor")
    # Tensors of other classes, such as those of a trace, may have no memory.
    if not _wanted() or sys.platform != "linux" or type(cache) is not Tensor or cache.device.type != "cpu":
        return False
    storage = cache.untyped_storage()
    begin = -(-storage.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (storage.data_ptr() + storage.nbytes()) // HUGE_PAGE * HUGE_PAGE
    if storage.nbytes() < MIN_BYTES or end <= begin:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advices = (_MADV_HUGEPAGE, _MADV_COLLAPSE) if written else (_MADV_HUGEPAGE,)
    return all(madvise(begin, end - begin, advice) == 0 for advice in advices)


def _wanted() -> bool:
    value = os.environ.get(VARIABLE, "1")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}; it must be 0 or 1")
    return value != "0"
