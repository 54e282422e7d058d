"""What a study found: a table and a plot of its cases, and what they say together.

    python -m benchmarks.report build/benchmarks/cpu_decode.json

Prints a written study again.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from benchmarks.harness import FORMAT, OURS

# Smaller caches stay in the processor's own, in part, so the summary leaves them out.
LEAST_BYTES = 64e6
# The summary's classes: how many times as fast as memory the loops are in cache, at least.
LEADS = (0.0, 1.0, 1.5, 2.0)


def bound_of(case: dict) -> tuple[float, str]:
    """GB/s that this package can reach by the rates measured with the case, and which of them it is.

    It can come out faster where a part of the caches is in the last-level cache.
    """
    products = case["kv_bytes"] / case["products"] * case["giga_products_per_second"]
    read = case["read_gb_per_second"]
    return (products, "compute") if products < read else (read, "read")


def share_of_read(case: dict, name: str) -> float:
    """A contender's share of the read bandwidth; NaN if it took no part."""
    result = case["contenders"].get(name, {})
    return result.get("share_of_read", result.get("gb_per_second", math.nan) / case["read_gb_per_second"])


def print_whole(table: Table, console: Console) -> None:
    """Widens the console if need be: a terminal that is too narrow wraps lines then, but no cell is cut."""
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table)


def table_of(title: str, first: str, others: Iterable[str]) -> Table:
    """An empty table with names in its first column and figures in the others."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def processor(facts: dict) -> str:
    """Its name, as titles have it."""
    return f"{facts['cpu']} (family/model {facts['cpu_family_model']})"


def threads_of(facts: dict) -> str:
    """How many threads there were, and which time was taken."""
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{threads}, CPU time" if facts.get("clock") == "cpu" else threads


def print_machine(facts: dict, console: Console) -> None:
    """What the figures below were measured with."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    forced = facts["forced_instruction_set"]
    console.print(
        f"{facts['date']}; {packages}; {facts['compiler']}; "
        f"{'forced to ' + forced if forced else facts['instruction_sets'].split()[0]}",
        soft_wrap=True,
        highlight=False,
    )


def print_tables(study: dict, console: Console) -> None:
    """A row a case: in one table our GB/s and shares, in the other how many times faster than each other.

    What bounds a case is the longer of two floors: reading K and V once, and multiplying with them. The
    column "in cache" is how fast our loops read K and V that never leave L2, "read only" how fast the op
    reads K and V if it computes nothing.
    """
    names = list(dict.fromkeys(name for case in study["cases"].values() for name in case["contenders"]))
    others = [name for name in names if name != OURS]
    facts = study["machine"]
    print_machine(facts, console)
    rates = table_of(
        f"{processor(facts)}, {threads_of(facts)}: GB/s of K and V",
        "case",
        ("MB", "read", "read only", "in cache", "ours", "share", "of the bound"),
    )
    ratios = table_of("Times as fast as", "case", others)
    for case_id, case in study["cases"].items():
        rate = case["contenders"].get(OURS, {}).get("gb_per_second", math.nan)
        bound, what = bound_of(case)
        rates.add_row(
            case_id,
            f"{case['kv_bytes'] / 1e6:.0f}",
            f"{case['read_gb_per_second']:.1f}",
            f"{case['read_only_gb_per_second']:.1f}" if "read_only_gb_per_second" in case else "-",
            f"{case['in_cache_gb_per_second']:.1f}",
            f"{rate:.1f}",
            f"{share_of_read(case, OURS):.0%}",
            f"{rate / bound:.0%} {what}",
        )
        theirs = [case["contenders"].get(name, {}).get("gb_per_second") for name in others]
        ratios.add_row(case_id, *(f"{rate / other:.2f}" if other else "-" for other in theirs))
    print_whole(rates, console)
    if others:
        print_whole(ratios, console)
    print_remarks(study, console)


def print_engines(study: dict, console: Console) -> None:
    """One table: how fast memory is read, how fast this package reads K and V, and others' times over its."""
    facts = study["machine"]
    names = list(dict.fromkeys(name for case in study["cases"].values() for name in case["contenders"]))
    others = [name for name in names if name != OURS]
    print_machine(facts, console)
    title = f"{processor(facts)}, {threads_of(facts)}: GB/s, then times as fast as"
    table = table_of(title, "case", ("read", "ours", *(name.replace(OURS, "ours") for name in others)))
    table.box = table.title = None
    console.print(title, soft_wrap=True, highlight=False)
    for case_id, case in study["cases"].items():
        rates = {name: result.get("gb_per_second") for name, result in case["contenders"].items()}
        ours = rates.get(OURS) or math.nan
        table.add_row(
            case_id,
            f"{case['read_gb_per_second']:.1f}",
            f"{ours:.1f}",
            *(f"{ours / rates[name]:.2f}" if rates.get(name) else "-" for name in others),
        )
    print_whole(table, console)
    print_remarks(study, console)


def print_remarks(study: dict, console: Console) -> None:
    """Why contenders are missing, and what those that are there compute with."""
    reasons = {
        f"{name}: {result['unavailable']}"
        for case in study["cases"].values()
        for name, result in case["contenders"].items()
        if "unavailable" in result
    }
    notes = {
        f"{name}: {result['note']}"
        for case in study["cases"].values()
        for name, result in case["contenders"].items()
        if "note" in result
    }
    for line in [*sorted(reasons), *sorted(notes)]:
        console.print(f"- {line}", soft_wrap=True, markup=False)


def draw(study: dict, path: Path) -> None:
    """Draws each contender's share of the read bandwidth, case by case."""
    from matplotlib.figure import Figure

    cases = study["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case["contenders"]))
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(cases)), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(names):
        points = [
            (share_of_read(case, name), row)
            for row, case in enumerate(cases.values())
            if "gb_per_second" in case["contenders"].get(name, {})
        ]
        if points:
            marker = "o" if name == OURS else "x+v^sd*"[i % 7]
            axis.scatter(*zip(*points, strict=True), label=name, marker=marker, s=36 if name == OURS else 22)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    bounds = {
        f"{OURS} is compute-bound here": [
            (bound_of(case)[0] / case["read_gb_per_second"], row)
            for row, case in enumerate(cases.values())
            if bound_of(case)[1] == "compute"
        ],
        f"{OURS} in cache, where memory is faster": [
            (case["in_cache_gb_per_second"] / case["read_gb_per_second"], row)
            for row, case in enumerate(cases.values())
            if case["in_cache_gb_per_second"] < case["read_gb_per_second"]
        ],
    }
    for (label, points), color in zip(bounds.items(), ("black", "tab:blue"), strict=True):
        if points:
            axis.scatter(*zip(*points, strict=True), label=label, marker="|", s=80, color=color)
    axis.set_yticks(range(len(cases)), list(cases), fontsize=7)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlim(left=0)
    axis.set_xlabel("K and V read, as a share of the machine's streaming-read bandwidth")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, fontsize=7)
    axis.set_title(f"{study['machine']['cpu']}, {threads_of(study['machine'])}", fontsize=9)
    figure.savefig(path, dpi=120)


def print_summary(study: dict, console: Console) -> None:
    """What the cases with caches of 64 MB and more say together, and where others come closest.

    Memory bounds a case if the loops in cache are far ahead of it, and the loops if they are behind it. In
    between both take their share of the time, because neither hides the other wholly.
    """
    by_kind: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    by_lead: dict[float, list[float]] = {}
    closest: dict[str, list[tuple[float, str]]] = {}
    for case_id, case in study["cases"].items():
        rate = case["contenders"].get(OURS, {}).get("gb_per_second")
        if rate is None:
            continue
        for name, result in case["contenders"].items():
            if name != OURS and "gb_per_second" in result:
                closest.setdefault(name, []).append((rate / result["gb_per_second"], case_id))
        if case["kv_bytes"] < LEAST_BYTES:
            continue
        read, in_cache = case["read_gb_per_second"], case["in_cache_gb_per_second"]
        reachable = min(case.get("read_only_gb_per_second", read), in_cache)
        share = share_of_read(case, OURS)
        by_kind.setdefault(kind_of(case_id), []).append((share, rate / reachable))
        by_lead.setdefault(max(lead for lead in LEADS if in_cache >= lead * read), []).append(share)

    def middle_and_least(values: list[float]) -> tuple[str, str]:
        return f"{statistics.median(values):.2f}", f"{min(values):.2f}"

    if by_kind:
        table = table_of(
            "64 MB and more: shares of the read bandwidth, of the lower of read only and in cache",
            "dtype, layout, query heads per KV head",
            ("cases", "median", "least", "of the lower", "least"),
        )
        for kind, shares in sorted(by_kind.items()):
            of_read, of_lower = zip(*shares, strict=True)
            table.add_row(
                ", ".join(kind), str(len(shares)), *middle_and_least(of_read), *middle_and_least(of_lower)
            )
        print_whole(table, console)
        table = table_of(
            "64 MB and more: shares by how fast the loops are in cache",
            "times the bandwidth",
            ("cases", "median", "least"),
        )
        for lead, shares in sorted(by_lead.items()):
            above = [f"to {other:g}" for other in LEADS if other > lead][:1] or ["and more"]
            table.add_row(f"{lead:g} {above[0]}", str(len(shares)), *middle_and_least(shares))
        print_whole(table, console)
    for name, ratios in closest.items():
        (least, where), (most, _) = min(ratios), max(ratios)
        console.print(f"{least:.2f} to {most:.1f} times as fast as {name}, least at {where}", soft_wrap=True)


def print_study(study: dict, console: Console) -> None:
    print_tables(study, console)
    print_summary(study, console)


def write_text(show: Callable[[dict, Console], None], study: dict, path: Path) -> None:
    """What `show` prints of a study, as a text file."""
    printed = io.StringIO()
    show(study, Console(file=printed, width=100))
    path.write_text("".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines()))


def kind_of(case_id: str) -> tuple[str, str, str]:
    """dtype, layout and class of query heads per KV head of a case, by its id."""
    parts = re.match(r"(\w+)-h(\d+)-kv(\d+)-", case_id)
    if parts is None:
        raise ValueError(f"{case_id!r} is no case's id")
    dtype, group = parts[1], int(parts[2]) // int(parts[3])
    layout = "NHD" if case_id.endswith("-tokens_first") else "HND"
    return dtype, layout, "1 to 4" if group <= 4 else "5 to 8" if group <= 8 else "over 8"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="the JSON file of a study")
    options = parser.parse_args(arguments)
    try:
        study = json.loads(options.study.read_text())
        made = study["machine"]["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{options.study} is no study: {type(error).__name__}: {error}")
    if made != FORMAT:
        sys.exit(f"{options.study} has format {made}; this version reads {FORMAT}")
    print_study(study, Console())


if __name__ == "__main__":
    main()
