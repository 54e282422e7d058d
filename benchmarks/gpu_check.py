"""Everything that only a GPU can tell, in one command of seven minutes: `python -m benchmarks.gpu_check`.

Builds the core in place for the GPU at hand, tries it, measures bandwidth, launches random shapes for a
while, runs the GPU tests, and has compute-sanitizer watch a few launches. Each part is a process with a limit
of its own, to which the time that earlier ones left is added, and leaves a JSON file; one that fails or is
stopped takes nothing from the others. Needs a CUDA toolkit and torch; --dry-run needs neither, and shows the
plan.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_parts

ROOT = gpu_parts.ROOT
STARTED = time.monotonic()
# Seconds that a part has to write what it knows, once it was told to stop.
GRACE = 5
# initcheck is left out: tickets and flags are read before anything was written there, by design.
SANITIZER_TOOLS: dict[str, tuple[str, ...]] = {
    # torch asks the driver for functions that it may not have: calls that fail are not errors here.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
    "synccheck": (),
}


@dataclass(frozen=True)
class Part:
    """Commands that share a time and a file of results."""

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    needed: bool = False  # where it fails, nothing else can run
    environment: tuple[tuple[str, str], ...] = ()


def plan(output: Path) -> list[Part]:
    def run(name: str, *options: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "benchmarks.gpu_check", "--part", name, *options)

    def part(name: str, seconds: int, needed: bool = False) -> Part:
        return Part(name, seconds, (run(name, "--output", str(output)),), needed)

    watched = tuple(
        (sanitizer(), "--tool", tool, "--error-exitcode", "1", *options, *run("launches"))
        for tool, options in SANITIZER_TOOLS.items()
    )
    # Each tensor in an allocation of its own, whose bounds are seen.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        part("build", 100, needed=True),
        part("smoke", 30),
        part("bandwidth", 65),
        part("soak", 45),
        part("tests", 120),
        Part("sanitizers", 60, watched, environment=uncached),
    ]


def sanitizer() -> str:
    """compute-sanitizer: on the PATH, or the toolkit's."""
    if found := shutil.which("compute-sanitizer"):
        return found
    toolkit = gpu_parts.build_module().cuda_toolkit()
    if toolkit is not None and (inside := toolkit / "bin" / "compute-sanitizer").exists():
        return str(inside)
    return "compute-sanitizer"


class Results:
    """A part's file, written anew with everything that is added to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, **row: object) -> None:
        self.update(rows=[*self.content.get("rows", []), row])

    def update(self, **content: object) -> None:
        self.content |= content
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.content, indent=2) + "\n")
        beside.replace(self.path)


def run(command: Sequence[str], limit: float, environment: dict[str, str]) -> dict:
    """Runs it for at most `limit` seconds; what it says is shown, and its end kept."""
    begin, tail = time.monotonic(), collections.deque(maxlen=40)
    ran: dict[str, object] = {"command": " ".join(command)}
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return {**ran, "ended": f"did not start: {error}"}

    def show() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.append(line.rstrip())

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        ran["ended"] = process.wait(max(1.0, limit - GRACE))
    except subprocess.TimeoutExpired:
        ran["ended"] = f"not within {limit:.0f} s"
    finally:
        stop(process)
    reader.join(1)
    return {**ran, "seconds": round(time.monotonic() - begin, 1), "tail": list(tail)}


def stop(process: subprocess.Popen) -> None:
    """And all that it has started: first by an interrupt, at which pytest writes its results."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def run_parts(parts: Sequence[Part], output: Path) -> dict[str, str]:
    """How each part ended: "passed", or what happened."""
    total = sum(part.seconds for part in parts)
    end, ended = time.monotonic() + total, {}
    for i, part in enumerate(parts):
        file = output / f"{part.name}.json"
        file.unlink(missing_ok=True)
        part_end = end - sum(later.seconds for later in parts[i + 1 :])
        print(f"== {part.name}: {part_end - time.monotonic():.0f} s at most", flush=True)
        runs: list[dict] = []
        for j, command in enumerate(part.commands):
            limit = (part_end - time.monotonic()) / (len(part.commands) - j)
            if "--output" in command:  # a part that keeps its results, and the time
                command = (*command, "--seconds", f"{limit - GRACE:.0f}")
            runs.append(run(command, limit, dict(part.environment)))
            Results(file).update(part=part.name, runs=runs)
        failures = [str(run["ended"]) for run in runs if run["ended"] != 0]
        ended[part.name] = "; ".join(failures) or "passed"
        if failures and part.needed:
            ended |= {later.name: f"left out, for {part.name} failed" for later in parts[i + 1 :]}
            break
    return ended


def run_part(name: str, output: Path, seconds: float) -> None:
    """In the part's own process."""
    keep, end = Results(output / f"{name}.json").keep, STARTED + seconds
    if name == "launches":
        gpu_parts.launches()
    elif name == "tests":
        gpu_parts.tests(keep, end, output / "tests.xml")
    elif name == "bandwidth":
        from benchmarks.gpu_bandwidth import bandwidth

        bandwidth(keep, end)
    else:
        {"build": gpu_parts.build, "smoke": gpu_parts.smoke, "soak": gpu_parts.soak}[name](keep, end)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    default = Path(os.environ.get("OUT") or Path("build") / "gpu_check")
    parser.add_argument("--output", type=Path, default=default, help=f"a folder; {default} if not given")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, and run nothing")
    names = ["build", "smoke", "bandwidth", "soak", "tests", "launches"]
    parser.add_argument("--part", choices=names, help="run this alone, in this process")
    parser.add_argument("--seconds", type=float, default=60.0, help="that the part has")
    given = parser.parse_args(arguments)
    output = given.output.resolve()
    if given.part:
        run_part(given.part, output, given.seconds)
        return
    parts = plan(output)
    if given.dry_run:
        for part in parts:
            print(f"{part.name}: {part.seconds} s, {output / part.name}.json")
            for command in part.commands:
                found = "" if shutil.which(command[0]) else "  (not installed here)"
                print(f"    {' '.join(command)}{found}")
        print(f"{sum(part.seconds for part in parts)} s in all")
        return
    ended = run_parts(parts, output)
    for name, how in ended.items():
        print(f"{name:12}{how}")
    print(f"written to {output}")
    if set(ended.values()) != {"passed"}:
        sys.exit(1)


if __name__ == "__main__":
    main()
