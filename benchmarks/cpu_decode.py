"""How fast does a CPU read its KV caches? This package, its peers and its baseline schedules.

    python -m benchmarks.cpu_decode            a subset, about three minutes on two cores
    python -m benchmarks.cpu_decode --full     the grid; an interrupted run continues with --resume
    python -m benchmarks.cpu_decode --engines  other engines on two lengths, in all dtypes and 8 bits

Prints a table and what its rows say together, and writes it beside a JSON file and a plot, by default into
build/benchmarks. `python -m benchmarks.report` prints such a JSON file again.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import peers
from benchmarks.harness import OUTPUTS, Case, run_study
from benchmarks.report import draw, print_engines, print_study, write_text

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = {
    "ragged8": (512, 2048, 4096, 9000, 14000, 23000, 41000, 65536),
    "one-long": (49152, *[1024] * 7),
    "short": tuple(range(100, 1700, 100)),
}


def subset() -> list[Case]:
    return [
        *(Case(dtype, (16384,), 32, 8, 128) for dtype in (BF16, F16, F32)),
        Case(BF16, (1024,), 32, 8, 128),
        Case(BF16, (131072,), 8, 1, 128),
        Case(BF16, (16384,), 8, 8, 128),
        Case(BF16, (16384,), 64, 8, 128),
        Case(BF16, (16384,), 32, 8, 128, "tokens_first"),
        Case(BF16, RAGGED["ragged8"], 32, 8, 128, name="ragged8"),
        Case(F32, RAGGED["one-long"], 32, 8, 128, name="one-long"),
    ]


def full_grid() -> list[Case]:
    cases = []
    for dtype in (BF16, F16, F32):
        # Lengths, then groups, head dims and layouts around 192 MB, then batches.
        cases += [Case(dtype, (n,), 32, 8, 128) for n in (1024, 4096, 16384, 65536, 262144)]
        tokens = 24576 if dtype == F32 else 49152
        cases += [Case(dtype, (tokens,), 8 * group, 8, 128) for group in (1, 4, 5, 7, 8, 16)]
        cases += [
            Case(dtype, (tokens * 128 // dim,), 8 * group, 8, dim)
            for dim in (64, 80, 256)
            for group in (1, 4, 8)
        ]
        cases += [Case(dtype, (tokens,), 8 * group, 8, 128, "tokens_first") for group in (1, 4, 8)]
        cases += [Case(dtype, (tokens // 4,), 32, 32, 128, "tokens_first")]
        cases += [Case(dtype, (2048,) * 16, 32, 8, 128), Case(dtype, (131072,), 8, 1, 128)]
        cases += [Case(dtype, lens, 32, 8, 128, name=name) for name, lens in RAGGED.items()]
    return list({case.id: case for case in cases}.values())


def engines() -> list[Case]:
    return [Case(dtype, (n,), 32, 8, 128) for dtype in (BF16, F16, F32) for n in (8192, 65536)]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [contender.name for contender in peers.ALL]
    which = result.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the whole grid instead of a subset")
    which.add_argument(
        "--engines", action="store_true", help="two lengths, with all engines and their caches"
    )
    result.add_argument("--resume", action="store_true", help="keep the cases that the JSON file already has")
    result.add_argument(
        "--only", metavar="REGEX", help="cases whose id matches, like bf16-h32-kv8-d128-b1-n1024"
    )
    result.add_argument(
        "--contenders",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"{', '.join(names)} (default: all but caches of 8 bits; with --engines all but splits)",
    )
    result.add_argument(
        "--seconds", type=float, default=1.0, help="time for each contender of a case (default 1)"
    )
    result.add_argument(
        "--memory", type=float, default=4.0, metavar="GB", help="largest KV caches (default 4)"
    )
    result.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    result.add_argument(
        "--cpu-time",
        action="store_true",
        help="with --threads 1: times are the processor's, for a machine that others use too",
    )
    result.add_argument(
        "--output",
        type=Path,
        default=OUTPUTS / "cpu_decode.json",
        help="JSON file; the tables and the plot go beside it",
    )
    result.add_argument("--list", action="store_true", help="print the cases' ids and stop")
    return result


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.seconds <= 0:
        sys.exit(f"--seconds {options.seconds} is not positive")
    if options.threads is not None:
        if options.threads < 1:
            sys.exit(f"--threads {options.threads} is not positive")
        torch.set_num_threads(options.threads)
    if options.cpu_time and options.threads != 1:
        sys.exit("--cpu-time adds up the time of all threads; it goes with --threads 1 only")
    cases = full_grid() if options.full else engines() if options.engines else subset()
    if options.only:
        try:
            cases = [case for case in cases if re.search(options.only, case.id)]
        except re.error as error:
            sys.exit(f"--only {options.only!r} is not a regular expression: {error}")
        if not cases:
            sys.exit(f"--only {options.only!r} matches no case (see --list)")
    if options.list:
        print("\n".join(case.id for case in cases))
        return
    console = Console()
    fits = [case for case in cases if case.allocated_bytes <= options.memory * 1e9]
    for case in cases:
        if case not in fits:
            console.print(f"left out, over --memory {options.memory:g} GB: {case.id}")
    contenders = peers.ENGINES if options.engines else peers.DEFAULT
    if options.contenders:
        contenders = [contender for contender in peers.ALL if contender.name in options.contenders]
    try:
        study = run_study(
            fits,
            contenders,
            options.output,
            resume=options.resume,
            seconds=options.seconds,
            clock="cpu" if options.cpu_time else "wall",
        )
    except KeyboardInterrupt:
        sys.exit(f"interrupted; --resume continues from {options.output}")
    except ValueError as error:
        sys.exit(str(error))
    show = print_engines if options.engines else print_study
    show(study, console)
    picture, tables = options.output.with_suffix(".png"), options.output.with_suffix(".txt")
    write_text(show, study, tables)
    written = [options.output, tables]
    try:
        draw(study, picture)
        written.append(picture)
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is not installed")
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


if __name__ == "__main__":
    main()
