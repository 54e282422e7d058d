"""Cases that pair every value of every feature with every value of every other one, where that is legal."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from allpairspy import AllPairs
from hypothesis import strategies as st
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8

# The first value of each is the plain one.
FEATURES: dict[str, list] = {
    "dtype": [BF16, F16, F32],
    "quantised": [None, E4M3, E5M2, INT8],
    "scales": ["", "scalar", "head", "sequence_head", "row"],
    "cache": ["tokens_first", "heads_first", "slots", "paged", "paged_heads_first", "pool", "table_per_head"],
    "block_size": [16, 1, 5, 64, 256],
    "query": [1, 3, 17, "packed"],
    "sees": ["causal", "all", "window_left", "window_both", "tree"],
    "softcap": [0.0, 5.0],
    "alibi": ["", "heads", "batch_heads"],
    "sinks": [False, True],
    "leftpad": [False, True],
    "group": [1, 4, 5, 7, 16],
    "dims": [(128, 128), (64, 64), (80, 96), (256, 256), (512, 512), (40, 24), (192, 128), (448, 512)],
    "lens": [(300, 1, 0), (127, 129, 128), (700, 3, 64), (0, 65, 255)],
    "num_ctas": [0, 1, 5, 61],
}


@dataclass(frozen=True)
class FeatureCase:
    dtype: torch.dtype = BF16
    quantised: torch.dtype | None = None
    scales: str = ""
    cache: str = "tokens_first"
    block_size: int = 16
    query: int | str = 1
    sees: str = "causal"
    softcap: float = 0.0
    alibi: str = ""
    sinks: bool = False
    leftpad: bool = False
    group: int = 1
    dims: tuple[int, int] = (128, 128)
    lens: tuple[int, ...] = (300, 1, 0)
    num_ctas: int = 0

    @property
    def paged(self) -> bool:
        return self.cache in ("paged", "paged_heads_first", "pool", "table_per_head")

    def __str__(self) -> str:
        def text(value) -> str:
            return (
                "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
            )

        changed = [
            f"{field.name}_{text(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "-".join(changed) or "plain"


def is_legal(values: list) -> bool:
    """Of the first so many features: what cannot be combined, or would be the same case twice."""
    case = FeatureCase(**dict(zip(FEATURES, values, strict=False)))
    known = set(list(FEATURES)[: len(values)])
    if "scales" in known and (case.quantised is None) != (case.scales == ""):
        return False
    if "block_size" in known and not case.paged and case.block_size != 16:
        return False
    return not ("alibi" in known and case.alibi and case.sees == "tree")


def all_pairs(**fixed: list) -> list[FeatureCase]:
    features = {**FEATURES, **fixed}
    return [FeatureCase(*values) for values in AllPairs(list(features.values()), filter_func=is_legal)]


def any_case(**fixed: list) -> st.SearchStrategy[FeatureCase]:
    """Any legal combination of all features."""
    features = {**FEATURES, **fixed}
    values = st.tuples(*(st.sampled_from(choices) for choices in features.values()))
    return values.map(list).filter(is_legal).map(lambda chosen: FeatureCase(*chosen))


# Many features at once, by name.
TOGETHER = [
    FeatureCase(cache="paged", sees="window_left", softcap=5.0, group=7, query=3, leftpad=True, num_ctas=5),
    FeatureCase(F16, E4M3, "row", "pool", 5, "packed", "window_both", 5.0, "batch_heads", True, True, 5),
    FeatureCase(
        BF16, INT8, "row", "table_per_head", 16, "packed", "tree", 5.0, "", True, True, 4, (256, 256)
    ),
    FeatureCase(
        F16, E5M2, "sequence_head", "slots", 16, 17, "causal", 5.0, "heads", True, True, 7, (512, 512)
    ),
]


def query_counts(case: FeatureCase) -> list[int]:
    """Query tokens of each sequence; one of a packed batch has none."""
    if case.query == "packed":
        return [(5, 0, 2, 9)[b % 4] for b in range(len(case.lens))]
    return [case.query] * len(case.lens)


def make_arguments(case: FeatureCase, kv_heads: int = 2) -> dict:
    """Fresh random arguments for `decode`. What no row sees is poison: NaN, or the largest number."""
    batch, heads, counts = len(case.lens), kv_heads * case.group, query_counts(case)
    options: dict = {"softcap": case.softcap, "num_ctas": case.num_ctas}
    lens = torch.tensor(case.lens, dtype=torch.int32)
    if case.cache == "table_per_head":
        lens = torch.stack([lens, (lens * 2 + 1) // 3], dim=1)
    options["seq_lens"] = lens
    if case.sees != "causal" and case.sees != "tree":
        options["causal"] = case.sees == "window_left"
    if case.sees.startswith("window"):
        options["window_left"] = 40
    if case.sees == "window_both":
        options["window_right"] = 1
    if case.leftpad:
        options["cache_leftpad"] = torch.tensor([(33, 0, 70)[b % 3] for b in range(batch)], dtype=torch.int32)
    if case.alibi:
        options["alibi_slopes"] = torch.rand((batch, heads) if case.alibi == "batch_heads" else heads) / 8
    if case.sinks:
        options["sinks"] = torch.randn(heads)

    if case.query == "packed":
        ends = torch.tensor([0, *counts]).cumsum(0)
        options["cu_seqlens_q"] = ends.int()
        rows = int(ends[-1]) + 2  # the last two belong to no sequence
        options["q"] = torch.randn(rows, heads, case.dims[0]).to(case.dtype)
    else:
        options["q"] = torch.randn(batch, case.query, heads, case.dims[0]).to(case.dtype)
    if case.sees == "tree":
        columns = max(counts)
        shape = (rows, columns) if case.query == "packed" else (batch, columns, columns)
        tree = torch.rand(shape) < 0.5
        for b in range(batch):  # a token sees itself
            own = tree[int(ends[b]) : int(ends[b + 1])] if case.query == "packed" else tree[b]
            own.fill_diagonal_(True)
        options["tree_mask"] = tree

    return {**options, **make_cache(case, lens, kv_heads, options, counts)}


def make_cache(case: FeatureCase, lens: Tensor, kv_heads: int, options: dict, counts: list[int]) -> dict:
    batch, longest = len(case.lens), int(lens.max())
    made: dict = {}
    if case.paged:
        block_size = case.block_size
        per_row = -(-longest // block_size) + 2
        num_blocks = batch * per_row * (kv_heads if case.cache == "table_per_head" else 1) + 3
        table = torch.randperm(num_blocks, dtype=torch.int32)[: num_blocks - 3]
        table = (
            table.reshape(batch, kv_heads, per_row)
            if case.cache == "table_per_head"
            else table.reshape(batch, per_row)
        )
        made["block_table"] = table
    else:
        block_size = longest + 9
        num_blocks = batch + 2 if case.cache == "slots" else batch
        if case.cache == "slots":
            made["cache_batch_idx"] = torch.randperm(num_blocks, dtype=torch.int32)[:batch]

    shape = (num_blocks, block_size, kv_heads)
    seen = torch.zeros(shape, dtype=torch.bool)
    for b in range(batch):
        for head in range(kv_heads):
            length = int(lens[b] if lens.dim() == 1 else lens[b, head])
            first = 0
            if case.sees.startswith("window"):
                first = max(0, length - counts[b] - options["window_left"])
            if case.leftpad:
                first = max(first, int(options["cache_leftpad"][b]))
            if counts[b] == 0:
                first = length
            for token in range(first, length):
                if not case.paged:
                    slot = b if case.cache != "slots" else int(made["cache_batch_idx"][b])
                    seen[slot, token, head] = True
                else:
                    row = table[b] if table.dim() == 2 else table[b, head]
                    seen[int(row[token // block_size]), token % block_size, head] = True
    if case.paged:  # entries of which nothing is seen may hold anything
        used = seen.any(dim=(1, 2))  # each block belongs to one row of the table
        unused = ~used[table.long()]
        table[unused] = torch.tensor([2**31 - 1, -7, num_blocks], dtype=torch.int32).repeat(table.numel())[
            : int(unused.sum())
        ]

    for name, dim in zip(("k_cache", "v_cache"), case.dims, strict=True):
        if case.quantised == INT8:
            cache = torch.randint(-128, 128, (*shape, dim), dtype=INT8)
        else:
            cache = torch.randn(*shape, dim).to(case.quantised or case.dtype)
        poison = 127 if case.quantised == INT8 else torch.nan
        numbers = cache.view(torch.uint8) if case.quantised in (E4M3, E5M2) else cache
        numbers[~seen] = 0x7F if case.quantised in (E4M3, E5M2) else poison
        made[name] = stored(cache, case.cache)
        if case.scales:
            made[name[0] + "_scale"] = make_scales(case, seen, batch, kv_heads)
    return made


def make_scales(case: FeatureCase, seen: Tensor, batch: int, kv_heads: int) -> Tensor:
    size = 0.015 if case.quantised == INT8 else 0.8
    if case.scales == "row":
        scales = size * (0.5 + torch.rand(seen.shape))
        scales[~seen] = torch.nan
        return scales
    shape = {"scalar": (), "head": (kv_heads,), "sequence_head": (batch, kv_heads)}[case.scales]
    return size * (0.5 + torch.rand(shape))


def stored(cache: Tensor, layout: str) -> Tensor:
    """The same cache in another layout: heads before tokens, or every second row of a pool for K and V."""
    if layout in ("heads_first", "paged_heads_first"):
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "pool":
        pool = torch.stack([cache, cache], dim=2)  # block, slot, K or V, head, dim
        return pool[:, :, 1]
    return cache
