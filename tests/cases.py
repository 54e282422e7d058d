"""Cases of decode as data, hostile inputs for them, and the one comparison that all tests use.

The id of a case says where it differs from the plain one, in this order, and can be pasted after `-k`:

    bf16 f16 f32     dtype of q
    int8 e4m3 e5m2   dtype of the caches, with .head .seq .row where scales are not one scalar
    h14 kv2          heads of q, of the caches
    d80v96           head_dim, head_dim_v
    q3, packed       query tokens of each sequence
    n300_1_0, b4096  lengths, or how many there are
    hnd slots        layout of the caches; with their page size: paged16 hndpaged16 pool16 heads16
    full w40 w40_1 tree    what a query sees, if not all before it: not causal, windows, a tree
    s0.3 cap5        scale, softcap
    alibi alibi2     slopes of heads, of sequences and heads
    sinks pad        attention sinks, left padding
    ctas5            size of the grid
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from lean_attention import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
DTYPES, QUANTISED = [F32, F16, BF16], [INT8, E4M3, E5M2]
SHORT = {F32: "f32", F16: "f16", BF16: "bf16", INT8: "int8", E4M3: "e4m3", E5M2: "e5m2"}
LONGEST_ID = 44  # 60 with that of a backend

# How ids name layouts.
CONTIGUOUS = {"tokens_first": "", "heads_first": "hnd", "slots": "slots"}
PAGED = {"paged": "paged", "paged_heads_first": "hndpaged", "pool": "pool", "table_per_head": "heads"}
SCALES = {"": "", "scalar": "", "head": ".head", "sequence_head": ".seq", "row": ".row"}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = BF16
    lens: tuple[int, ...] = (300, 1, 0)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    head_dim_v: int = 0  # 0: head_dim
    q_len: int | str = 1  # or "packed", other counts for each sequence
    quantised: torch.dtype | None = None
    scales: str = ""
    layout: str = "tokens_first"
    block_size: int = 16
    causal: bool = True
    window_left: int = -1
    window_right: int = -1
    tree: bool = False
    scale: float | None = None
    softcap: float = 0.0
    alibi: str = ""
    sinks: bool = False
    leftpad: bool = False
    num_ctas: int = 0
    name: str = ""  # in place of an id that would be too long

    @property
    def paged(self) -> bool:
        return self.layout in PAGED

    @property
    def dims(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim_v or self.head_dim

    @property
    def query_counts(self) -> list[int]:
        """Query tokens of each sequence; one of a packed batch has none."""
        if self.q_len == "packed":
            return [(5, 0, 2, 9)[b % 4] for b in range(len(self.lens))]
        return [self.q_len] * len(self.lens)

    def __str__(self) -> str:
        """See the head of this file."""
        if self.name:
            return self.name
        changed = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        window = f"w{self.window_left}" + (f"_{self.window_right}" if self.window_right >= 0 else "")
        lens = "n" + "_".join(map(str, self.lens)) if len(self.lens) < 7 else f"b{len(self.lens)}"
        parts = [
            SHORT[self.dtype],
            SHORT[self.quantised] + SCALES[self.scales] if self.quantised else "",
            f"h{self.heads}" if "heads" in changed else "",
            f"kv{self.kv_heads}" if "kv_heads" in changed else "",
            f"d{self.head_dim}" if {"head_dim", "head_dim_v"} & changed else "",
            f"q{self.q_len}" if self.q_len != "packed" else "packed",
            lens if "lens" in changed else "",
            f"{PAGED[self.layout]}{self.block_size}" if self.paged else CONTIGUOUS[self.layout],
            "" if self.causal or self.window_right >= 0 else "full",
            window if self.window_left >= 0 or self.window_right >= 0 else "",
            "tree" if self.tree else "",
            f"s{self.scale:g}" if self.scale is not None else "",
            f"cap{self.softcap:g}" if self.softcap else "",
            {"": "", "heads": "alibi", "batch_heads": "alibi2"}[self.alibi],
            "sinks" if self.sinks else "",
            "pad" if self.leftpad else "",
            f"ctas{self.num_ctas}" if self.num_ctas else "",
        ]
        if self.head_dim_v:
            parts[4] += f"v{self.head_dim_v}"
        return "-".join(part for part in parts if part and part != "q1")


# Head dims and query heads per KV head (odd ones too), lengths at the edges of runs and LeanTiles, more query
# rows than one block, windows.
CASES = [
    Case(F32, lens=(0,)),
    Case(F32, lens=(0, 1, 127, 128, 129, 300), heads=8),
    Case(BF16, lens=(63, 64, 65, 0, 255, 257), heads=8, layout="heads_first"),
    Case(BF16, lens=(3001, 5, 17), heads=14, head_dim=64),
    Case(F32, lens=(5000, 3, 900), heads=5, kv_heads=1, head_dim=80, head_dim_v=96, layout="heads_first"),
    Case(F16, lens=(5000, 3, 900), heads=3, kv_heads=1, head_dim=96, head_dim_v=80),
    Case(BF16, lens=(400, 77), heads=16, kv_heads=1, head_dim=192, head_dim_v=128),
    Case(F16, lens=(400, 77), heads=32, head_dim=256, layout="heads_first"),
    Case(F32, lens=(400, 77), heads=9, kv_heads=1, head_dim=256),
    Case(BF16, lens=(130, 9), heads=6, head_dim=448, head_dim_v=512),
    Case(F32, lens=(130, 90), heads=64, kv_heads=1, head_dim=8, layout="heads_first"),
    Case(BF16, lens=(130, 90), heads=6, kv_heads=1, head_dim=8, head_dim_v=16),
    Case(F16, lens=(130, 90), heads=6, kv_heads=6, head_dim=24, head_dim_v=40),
    Case(BF16, lens=(130, 90), heads=12, kv_heads=6, head_dim=120, head_dim_v=104, layout="heads_first"),
    Case(F32, lens=(700, 2, 0, 301), q_len=4, layout="heads_first"),
    Case(F16, lens=(700, 2, 0, 301), heads=4, kv_heads=4, q_len=7, causal=False),
    Case(BF16, lens=(300, 131), heads=8, q_len=40),
    Case(F32, lens=(300, 131), heads=7, kv_heads=1, q_len=128),
    Case(BF16, lens=(900, 40), window_left=100),
    Case(F16, lens=(900, 40), q_len=5, causal=False, window_left=9, window_right=2, layout="heads_first"),
    Case(F32, lens=(260, 40), q_len=90, window_left=0),
    Case(F32, lens=(20000, 1, 64), heads=8, kv_heads=8, head_dim=64, scale=0.3),
    Case(BF16, lens=(20000, 1, 64), heads=8, layout="heads_first"),
]

# Many features at once.
TOGETHER = [
    Case(
        heads=14, q_len=3, layout="paged", window_left=40, softcap=5.0, leftpad=True, num_ctas=5,
        name="window-in-pages",
    ),
    Case(
        F16, quantised=E4M3, scales="row", heads=10, q_len="packed", layout="pool", block_size=5,
        causal=False, window_left=40, window_right=1, softcap=5.0, alibi="batch_heads", sinks=True,
        leftpad=True, name="e4m3-rows-in-a-pool",
    ),
    Case(
        BF16, quantised=INT8, scales="row", heads=8, head_dim=256, q_len="packed", layout="table_per_head",
        tree=True, softcap=5.0, sinks=True, leftpad=True, name="int8-tree-and-a-table-per-head",
    ),
    Case(
        F16, quantised=E5M2, scales="sequence_head", heads=14, head_dim=512, q_len=17, layout="slots",
        softcap=5.0, alibi="heads", sinks=True, leftpad=True, name="e5m2-slots-d512",
    ),
]  # fmt: skip

# What a query sees.
SEES: dict[str, dict] = {
    "causal": {},
    "full": {"causal": False},
    "window_left": {"window_left": 40},
    "window_both": {"window_left": 40, "window_right": 1, "causal": False},
    "tree": {"tree": True},
}
# Of Case's fields, or of what takes several: values to pair, the plain one first.
FEATURES: dict[str, list] = {
    "dtype": [BF16, F16, F32],
    "quantised": [None, E4M3, E5M2, INT8],
    "scales": ["", "scalar", "head", "sequence_head", "row"],
    "layout": [*CONTIGUOUS, *PAGED],
    "block_size": [16, 1, 5, 64, 256],
    "q_len": [1, 3, 17, "packed"],
    "sees": list(SEES),
    "softcap": [0.0, 5.0],
    "alibi": ["", "heads", "batch_heads"],
    "sinks": [False, True],
    "leftpad": [False, True],
    "heads": [2, 8, 10, 14, 32],
    "dims": [(128, 0), (80, 96), (512, 0), (40, 24)],
    "lens": [(300, 1, 0), (127, 129), (700, 64), (0, 65)],
    "num_ctas": [0, 1, 5, 61],
}
ALL_DIMS = [*FEATURES["dims"], (64, 0), (256, 0), (192, 128), (448, 512)]


def case_of(chosen: dict) -> Case:
    """Of values of FEATURES, or of some of them."""
    chosen = {name: value for name, value in chosen.items() if name in FEATURES}
    sees = SEES[chosen.pop("sees", "causal")]
    head_dim, head_dim_v = chosen.pop("dims", (128, 0))
    return Case(**chosen, **sees, head_dim=head_dim, head_dim_v=head_dim_v)


def is_legal(chosen: dict) -> bool:
    """What cannot be combined, or would be the same case twice."""
    case = case_of(chosen)
    if "scales" in chosen and (case.quantised is None) != (case.scales == ""):
        return False
    if "block_size" in chosen and not case.paged and case.block_size != 16:
        return False
    return not (case.alibi and case.tree)


def all_pairs(**other: list) -> list[dict]:
    """Choices in which each two values of two features, and of others, meet, in cases with short ids."""
    from allpairspy import AllPairs  # here, so that tests without pairs run where it is not installed

    features = {**FEATURES, **other}

    def is_wanted(values: list) -> bool:
        chosen = dict(zip(features, values, strict=False))
        return is_legal(chosen) and len(str(case_of(chosen))) <= LONGEST_ID

    return [
        dict(zip(features, values, strict=True))
        for values in AllPairs(list(features.values()), filter_func=is_wanted)
    ]


def any_case(**other: list) -> st.SearchStrategy[Case]:
    """Any legal combination of all features."""
    features = {**FEATURES, "dims": ALL_DIMS, **other}
    chosen = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in features.items()})
    return chosen.filter(is_legal).map(case_of)


def make_inputs(case: Case) -> dict:
    """Fresh random arguments for `decode`. What no row sees is poison: NaN, or the largest number."""
    batch, counts, lens = len(case.lens), case.query_counts, torch.tensor(case.lens, dtype=torch.int32)
    if case.layout == "table_per_head":
        lens = torch.stack([(lens * (3 - head % 3) + 1) // 3 for head in range(case.kv_heads)], dim=1).int()
    ends = torch.tensor([0, *counts]).cumsum(0)
    rows = (int(ends[-1]) + 2,) if case.q_len == "packed" else (batch, case.q_len)  # two of no sequence
    inputs: dict = {
        "q": torch.randn(*rows, case.heads, case.head_dim).to(case.dtype),
        "k_cache": None,
        "v_cache": None,
        "seq_lens": lens,
    }
    for name in ("causal", "window_left", "window_right", "scale", "softcap", "num_ctas"):
        if getattr(case, name) != getattr(Case, name):
            inputs[name] = getattr(case, name)
    if case.q_len == "packed":
        inputs["cu_seqlens_q"] = ends.int()
    if case.leftpad:
        inputs["cache_leftpad"] = torch.tensor([(33, 0, 70)[b % 3] for b in range(batch)], dtype=torch.int32)
    if case.alibi:
        shape = (batch, case.heads) if case.alibi == "batch_heads" else (case.heads,)
        inputs["alibi_slopes"] = torch.rand(shape) / 8
    if case.sinks:
        inputs["sinks"] = torch.randn(case.heads)
    if case.tree:
        tree = torch.rand(*rows, max(counts)) < 0.5
        for b in range(batch):  # a token sees itself
            own = tree[int(ends[b]) : int(ends[b + 1])] if case.q_len == "packed" else tree[b]
            own.fill_diagonal_(True)
        inputs["tree_mask"] = tree
    inputs |= make_cache(case, lens, inputs.get("cache_leftpad"))
    return inputs


INDICES = ("seq_lens", "block_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q", "cu_seqlens")


def with_int64(arguments: dict, names: Iterable[str] = INDICES) -> dict:
    """The same with these indices in int64. Poison among them then is a block by its low 32 bits."""
    made = dict(arguments)
    for name in names:
        if isinstance(made.get(name), Tensor):
            made[name] = made[name].long()
            made[name][made[name] == 2**31 - 1] = 2**32
            made[name][made[name] == -7] = -(2**33)
    return made


def make_cache(case: Case, lens: Tensor, leftpad: Tensor | None) -> dict:
    batch, longest, made = len(case.lens), int(lens.max()), {}
    if case.paged:
        block_size = case.block_size
        per_row = -(-longest // block_size) + 2
        own_tables = case.kv_heads if case.layout == "table_per_head" else 1
        num_blocks = batch * per_row * own_tables + 3
        table = torch.randperm(num_blocks, dtype=torch.int32)[: num_blocks - 3]
        made["block_table"] = table = table.view(
            (batch, own_tables, per_row) if own_tables > 1 else (batch, per_row)
        )
    else:
        block_size = longest + 9
        num_blocks = batch + 2 if case.layout == "slots" else batch
        slots = torch.randperm(num_blocks, dtype=torch.int32)[:batch]
        if case.layout == "slots":
            made["cache_batch_idx"] = slots
        else:
            slots = torch.arange(batch)

    seen = torch.zeros(num_blocks, block_size, case.kv_heads, dtype=torch.bool)
    for b, count in enumerate(case.query_counts):
        for head in range(case.kv_heads):
            length = int(lens[b] if lens.dim() == 1 else lens[b, head])
            first = max(0, length - count - case.window_left) if case.window_left >= 0 else 0
            first = max(first, int(leftpad[b])) if leftpad is not None else first
            tokens = torch.arange(min(first, length) if count else length, length)
            if case.paged:
                row = (table[b] if table.dim() == 2 else table[b, head]).long()
                seen[row[tokens // block_size], tokens % block_size, head] = True
            else:
                seen[int(slots[b]), tokens, head] = True
    if case.paged:  # entries of which nothing is seen may hold anything
        unused = ~seen.any(dim=(1, 2))[table.long()]  # each block belongs to one row of the table
        poison = torch.tensor([2**31 - 1, -7, num_blocks], dtype=torch.int32).repeat(table.numel())
        table[unused] = poison[: int(unused.sum())]

    for name, dim in zip(("k_cache", "v_cache"), case.dims, strict=True):
        shape = (num_blocks, block_size, case.kv_heads, dim)
        if case.quantised == INT8:
            cache = torch.randint(-128, 128, shape, dtype=INT8)
            cache[~seen] = 127
        elif case.quantised:
            cache = torch.randn(shape).to(case.quantised)
            cache.view(torch.uint8)[~seen] = 0x7F  # NaN
        else:
            cache = torch.randn(shape, dtype=case.dtype)
            cache[~seen] = torch.nan
        made[name] = stored(cache, case.layout)
        if case.scales:
            made[name[0] + "_scale"] = make_scales(case, seen)
    return made


def make_scales(case: Case, seen: Tensor) -> Tensor:
    size = 0.015 if case.quantised == INT8 else 0.8
    if case.scales == "row":
        scales = size * (0.5 + torch.rand(seen.shape))
        scales[~seen] = torch.nan
        return scales
    batch, kv_heads = len(case.lens), case.kv_heads
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


def assert_close(case: Case | str, arguments: dict, out: Tensor, lse: Tensor) -> None:
    """At most twice the error of the plain sum in the same dtype, against float64."""
    arguments = {name: value for name, value in arguments.items() if name != "num_ctas"}
    dtype = arguments["q"].dtype
    want, want_lse = reference.decode(**arguments)
    assert out.shape == want.shape, f"{case}: out has shape {out.shape}, the reference {want.shape}"
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.isfinite().all(), f"{case}: {(~out.isfinite()).sum()} elements are not finite"
    error = (out.double() - want).abs()
    # What a user of PyTorch would get without a kernel: the same sum, written plainly in one dtype.
    plain_out, _ = reference.decode(**arguments, dtype=dtype)
    plain = (plain_out.double() - want).abs().max()
    absolute = {F32: 2e-6, F16: 1e-4, BF16: 1e-3}[dtype]
    # Elements above 4, which caches of large numbers have, are rounded by as much more.
    limit = 2 * plain + absolute * (want.abs() / 4).clamp(min=1)
    if not (error <= limit).all():
        where = tuple(int(i) for i in torch.unravel_index((error - limit).argmax(), error.shape))
        raise AssertionError(
            f"{case}: out{list(where)} is {out[where]}, the reference {want[where]:.6g}; error "
            f"{error[where]:.3g} exceeds {limit[where]:.3g} (plain {dtype}: {plain:.3g})"
        )
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf), f"{case}: rows that see nothing"
    finite = want_lse.isfinite()
    lse_error = (lse.double() - want_lse)[finite].abs()
    lse_limit = 2e-6 * (1 + want_lse[finite].abs())
    assert (lse_error <= lse_limit).all(), f"{case}: lse is off by {lse_error.max():.3g}"


def assert_same_non_finite(case: Case | str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """NaN and both infinities in the same places."""
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        for value in (torch.nan, torch.inf, -torch.inf):
            where = [tensor.isnan() if value != value else tensor == value for tensor in (a, b)]
            assert torch.equal(*where), f"{case}: {name} has {value} in other places"


def in_dtypes(case: Case, dtypes: list[torch.dtype]) -> Case:
    """The same case in a dtype that a backend has."""
    return case if case.dtype in dtypes else replace(case, dtype=BF16)
