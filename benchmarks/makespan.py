"""How much longer fixed splits take than stream-K, by counting LeanTiles: a simulation, no measurement.

    python -m benchmarks.makespan

Every LeanTile takes as long as any other, pieces are taken in order by whichever CTA is free, and merging
costs nothing. So this is what the shape of the work alone costs, which a machine with few threads does not
show.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from benchmarks.cpu_decode import RAGGED
from benchmarks.report import print_whole, table_of
from lean_attention import Schedule
from lean_attention.tools.picture import fixed_split, stream_k

SPLITS = (1, 2, 4, 8, 16, 32)
BATCHES = {
    "1 x 65536": (65536,),
    "16 x 2048": (2048,) * 16,
    "34 x 4096": (4096,) * 34,
    **RAGGED,
    "31 x 1024 + 65536": (65536, *[1024] * 31),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.makespan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ctas", type=int, nargs="+", default=[2, 16, 264], metavar="COUNT")
    options = parser.parse_args(arguments)
    for name, value in (
        ("--kv-heads", options.kv_heads),
        ("--head-dim", options.head_dim),
        *(("--ctas", count) for count in options.ctas),
    ):
        if value < 1:
            parser.error(f"{name} must be positive, got {value}")
    for count in options.ctas:
        table = table_of(
            f"{count} CTAs: time of a fixed split / time of stream-K",
            f"lengths, {options.kv_heads} KV heads",
            (f"split {splits}" for splits in SPLITS),
        )
        for name, lens in BATCHES.items():
            schedule = Schedule(lens, options.kv_heads, num_ctas=count, head_dim=options.head_dim)
            lean = stream_k(schedule).makespan
            splits = (fixed_split(schedule, splits).makespan / lean for splits in SPLITS)
            table.add_row(name, *(f"{times:.2f}" for times in splits))
        print_whole(table, Console())


if __name__ == "__main__":
    main()
