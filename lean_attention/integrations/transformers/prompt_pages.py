"""Several sequences of a prompt whose tokens are kept once, in pages that all of them name.

A pool has first the full pages of each prompt, then blocks of one page for each row: the prompt's last
tokens, where they fill no page, and the row's own. Rows of a prompt of two pages and their own tokens:

    block          | 0 | 1 | 2 | 3 |
    row 0 has page   0   1   2   5
    row 1            0   1   3   6
    row 2            0   1   4   7

Only the last block is ever written to, and its pages are each row's own. Full ones are not: beams that are
reordered exchange the numbers of their pages, and copy the last one alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lean_attention.huge_pages import use_huge_pages

PAGE = 16
# Blocks that a pool has room for beyond those it needs: as many as an eighth of its pages make, at the least
# this many.
RESERVE_BLOCKS = 4
RESERVE_SHARE = 8


@dataclass(frozen=True, eq=False, repr=False)
class Pages:
    """Keys and values of rows that have their first pages in common."""

    keys: Tensor  # [pages, num_kv_heads, PAGE, head_dim]
    values: Tensor  # [pages, num_kv_heads, PAGE, head_dim_v]
    table: Tensor  # [rows, blocks] int32: the pages of a row, those of its room included
    prompt_blocks: int  # of each row
    prompt_pages: int  # of all prompts
    tokens: int

    @property
    def rows(self) -> int:
        return len(self.table)

    def states(self) -> tuple[PagedStates, PagedStates]:
        """Keys and values as tensors."""
        return PagedStates(self, "keys"), PagedStates(self, "values")

    def takes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether new tokens are of the kind that these pages hold."""

        def alike(new: Tensor, pool: Tensor) -> bool:
            shape = (self.rows, pool.shape[1], new.shape[2], pool.shape[3])
            return new.shape == shape and new.dtype == pool.dtype and new.device == pool.device

        return alike(keys, self.keys) and alike(values, self.values)

    def append(self, keys: Tensor, values: Tensor) -> Pages:
        """These and new tokens, ``[rows, num_kv_heads, tokens, head_dim]``, written behind them."""
        end = self.tokens + keys.shape[2]
        pages = self._writable() if end <= PAGE * self.table.shape[1] else self._with_room(end)
        begin = self.tokens
        while begin < end:
            block, slot = divmod(begin, PAGE)
            count = min(PAGE - slot, end - begin)
            new = slice(begin - self.tokens, begin - self.tokens + count)
            for pool, states in ((pages.keys, keys), (pages.values, values)):
                pool[self._own(block), :, slot : slot + count] = states[:, :, new]
            begin += count
        return dataclasses.replace(pages, tokens=end)

    def reorder(self, source: Tensor) -> Pages:
        """Row `i` becomes what row ``source[i]`` was; `source` is ``[rows]``."""
        pages = self._writable()
        block, slot = divmod(self.tokens, PAGE)
        if slot:
            for pool in (pages.keys, pages.values):
                last = pool[self._own(block), :, :slot]
                last.copy_(last.index_select(0, source))
        full = self.table[:, :block].index_select(0, source)
        return dataclasses.replace(pages, table=torch.cat([full, self.table[:, block:]], dim=1))

    def whole(self, which: str) -> Tensor:
        """A copy of "keys" or "values", ``[rows, num_kv_heads, tokens, head_dim]``."""
        pool = getattr(self, which)
        tokens = pool.new_empty(self.rows, pool.shape[1], self.tokens, pool.shape[3])
        for row, table in zip(tokens, self.table[:, : _blocks(self.tokens)], strict=True):
            row.copy_(pool.index_select(0, table).transpose(0, 1).flatten(1, 2)[:, : self.tokens])
        return tokens

    def _own(self, block: int) -> slice:
        """The pages of a block behind the prompt's."""
        begin = self.prompt_pages + (block - self.prompt_blocks) * self.rows
        return slice(begin, begin + self.rows)

    def _writable(self) -> Pages:
        """Nobody may write to what inference mode has made after it has ended."""
        closed = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        return self._with_room(self.tokens) if closed else self

    def _with_room(self, tokens: int) -> Pages:
        """A copy with room for so many tokens, and some more."""
        held = _blocks(self.tokens)
        end, filled = _with_reserve(self._own(_blocks(tokens)).start, self.rows), self._own(held).start
        pools = [_pool(end, like=pool) for pool in (self.keys, self.values)]
        for pool, old in zip(pools, (self.keys, self.values), strict=True):
            pool[:filled] = old[:filled]
        table = torch.cat([self.table[:, :held], _columns(filled, end, self.rows)], dim=1)
        return dataclasses.replace(self, keys=pools[0], values=pools[1], table=table)


def repeat_in_pages(keys: Tensor, values: Tensor, repeats: int) -> Pages:
    """Pages of prompts, ``[prompts, num_kv_heads, tokens, head_dim]``, each for `repeats` adjoining rows."""
    prompts, tokens = keys.shape[0], keys.shape[2]
    blocks, rows = tokens // PAGE, prompts * repeats
    prompt_pages = prompts * blocks
    end = _with_reserve(prompt_pages + rows * (_blocks(tokens) - blocks), rows)
    pools = []
    for held in (keys, values):
        pool = _pool(end, like=held)
        full = pool[:prompt_pages].view(prompts, blocks, *pool.shape[1:]).transpose(1, 2)
        full.copy_(held[:, :, : blocks * PAGE].unflatten(2, (blocks, PAGE)))
        pools.append(pool)
    of_prompts = _numbers(0, prompt_pages).view(prompts, blocks)
    table = torch.cat(
        [of_prompts.repeat_interleave(repeats, dim=0), _columns(prompt_pages, end, rows)], dim=1
    )
    pages = Pages(*pools, table, blocks, prompt_pages, tokens=blocks * PAGE)
    return pages.append(*(x[:, :, blocks * PAGE :].repeat_interleave(repeats, dim=0) for x in (keys, values)))


def _pool(pages: int, like: Tensor) -> Tensor:
    pool = like.new_empty(pages, like.shape[1], PAGE, like.shape[3])
    use_huge_pages(pool, written=False)
    return pool


def _blocks(tokens: int) -> int:
    return -(-tokens // PAGE)


def _with_reserve(pages: int, rows: int) -> int:
    return pages + rows * max(RESERVE_BLOCKS, pages // (RESERVE_SHARE * rows))


def _columns(begin: int, end: int, rows: int) -> Tensor:
    """A table's columns of blocks with one page for each row: pages `begin` to `end`."""
    return _numbers(begin, end).view(-1, rows).t()


def _numbers(begin: int, end: int) -> Tensor:
    return torch.arange(begin, end, dtype=torch.int32, device="cpu")  # pages are on CPUs only


class PagedStates(torch.Tensor):
    """Keys or values, ``[rows, num_kv_heads, tokens, head_dim]``, that lie in pages.

    This package's attention reads the pages. To everything else it is the tensor that they make: the first
    operation makes it, and from then on it is what counts, since it may have been written to.
    """

    pages: Pages
    which: str  # "keys" or "values"
    made: Tensor | None

    @staticmethod
    def __new__(cls, pages: Pages, which: str, made: Tensor | None = None) -> PagedStates:
        pool = getattr(pages, which)
        shape = (pages.rows, pool.shape[1], pages.tokens, pool.shape[3])
        states = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=pool.dtype, device=pool.device)
        states.pages, states.which, states.made = pages, which, made
        return states

    def __repr__(self) -> str:
        return f"PagedStates({self.which}, shape={list(self.shape)})"

    def __deepcopy__(self, memo: dict) -> PagedStates:
        copied = PagedStates(*(copy.deepcopy(each, memo) for each in (self.pages, self.which, self.made)))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, _protocol: int) -> tuple:
        return PagedStates, (self.pages, self.which, self.made)

    # What does not come by way of an operation.
    def numpy(self, **options) -> object:
        return self.whole().numpy(**options)

    def tolist(self) -> list:
        return self.whole().tolist()

    def data_ptr(self) -> int:
        return self.whole().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.whole().untyped_storage()

    def whole(self) -> Tensor:
        if self.made is None:
            self.made = self.pages.whole(self.which)
        return self.made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


def whole(x: object) -> object:
    """An ordinary tensor in the place of `PagedStates`; anything else as it is."""
    return x.whole() if isinstance(x, PagedStates) else x


def pages_of(keys: object, values: object) -> Pages | None:
    """The pages that both lie in; None for ordinary tensors, and where somebody has made such of them."""
    if not isinstance(keys, PagedStates) or not isinstance(values, PagedStates):
        return None
    if keys.pages is not values.pages or (keys.which, values.which) != ("keys", "values"):
        return None
    return keys.pages if keys.made is None and values.made is None else None


@functools.lru_cache(maxsize=4)
def equal_lengths(rows: int, tokens: int) -> Tensor:
    """``[rows]`` int32: `tokens`, which all layers of a step have in common."""
    with torch.inference_mode(False):  # it outlives the call
        return torch.full((rows,), tokens, dtype=torch.int32, device="cpu")
