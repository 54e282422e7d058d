"""Every causal-LM family that transformers knows: attention through this package against eager attention.

    python -m benchmarks.transformers_families --only 'llama|gemma'

Builds each family as a tiny random model (float32) and generates greedily with every cache and every kind of
prompts below. The tokens of eager attention are forced upon the other, so that all logits can be compared.
Each family has a process of its own, which may crash or hang.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import itertools
import logging
import math
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lean_attention
from benchmarks.tiny_families import build, named, randomise
from lean_attention.integrations import transformers as integration
from lean_attention.integrations.transformers.options import KNOWN_OPTIONS, SCORE_OPTIONS
from lean_attention.integrations.transformers.sparse import SELECTIONS

OUTPUT = Path(__file__).parent / "results" / "transformers_families.txt"
NEW_TOKENS = 14
# Tokens to choose from: no family has a special one here.
ORDINARY = range(10, 100)
MEMORY_BYTES = 6 << 30


class Unsupported(Exception):
    """Why a family has no such cache."""


def lean_cache(model: PreTrainedModel, config: PretrainedConfig, kv_cache: str) -> dict:
    takes = integration.CACHE_PARAMETER in inspect.signature(model.forward).parameters
    if not takes or not model._supports_default_dynamic_cache():
        raise Unsupported("no dynamic cache")
    return {integration.CACHE_PARAMETER: integration.LeanCache(config, kv_cache=kv_cache)}


# Options of `generate` for a cache, given the model and its text config. Static caches are for compiled
# steps; whether those compile is for the tests.
CACHES: dict[str, Callable[[PreTrainedModel, PretrainedConfig], dict]] = {
    "dynamic": lambda model, config: {},
    "static": lambda model, config: {"cache_implementation": "static", "disable_compile": True},
    "lean": lambda model, config: lean_cache(model, config, "auto"),
    "lean, int8": lambda model, config: lean_cache(model, config, "int8"),
}
# The cache that eager attention has, where it is another. It reads an int8 cache as it is stored.
EAGER_CACHES = {"lean": "dynamic"}
# Largest difference of logits, as a share of the largest logit. A number that is rounded up by one and down
# by the other differs by a 127th of a token's largest.
TOLERANCES = dict.fromkeys(CACHES, 1e-3) | {"lean, int8": 2e-2}
# Lengths of the prompts of a batch. All are longer than the windows, chunks and top-k of the tiny models, and
# the first and last are prefills to the integration, the middle one are steps of few tokens.
PROMPTS = {
    "one length": (40, 40),
    "left-padded": (25, 14, 1),
    "left-padded, long": (41, 23, 1),
}

OUTCOMES = {
    "op": "every step of one token goes through lean_attention.decode",
    "falls back": "some steps are left to another implementation, and a warning says why",
    "not reached": "the family has attention of its own, which takes no implementation by name",
    "as sdpa": "differs from eager attention, and so does transformers' own sdpa, by the same",
    "padding leaks": "differs only with padding, and the family lets what padding holds through",
    "silent": "some steps are left to another implementation, and nothing says so",
    "differs": "from eager attention: by what share of the largest logit, the first other token",
    "fails": "an error, a crash or no end where eager attention has none",
    "not built": "the tiny model could not be built, or eager attention does not run",
}
WRONG = ("silent", "differs", "fails")


def prompts(lengths: tuple[int, ...], pad: int = 0) -> dict[str, Tensor]:
    longest = max(lengths)
    ids = torch.randint(ORDINARY.start, ORDINARY.stop, (len(lengths), longest))
    mask = torch.ones_like(ids)
    for b, length in enumerate(lengths):
        ids[b, : longest - length] = pad
        mask[b, : longest - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Tokens(transformers.LogitsProcessor):
    """Makes generation take given tokens, a step after the other, or else the likeliest; keeps them."""

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        self.given, self.taken = given, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        likeliest = scores[:, ORDINARY.start : ORDINARY.stop].argmax(dim=-1) + ORDINARY.start
        tokens = self.given[len(self.taken)] if self.given else likeliest
        self.taken.append(tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], options: dict, tokens: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Tokens of every step, and their logits: [steps, batch, vocabulary]."""
    chooser = Tokens(tokens)
    out = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=transformers.LogitsProcessorList([chooser]),
        **options,
    )
    return chooser.taken, torch.stack([step.float() for step in out.logits])


@dataclass
class Seen:
    """What came by while a model ran."""

    calls: int = 0  # of the attention interface
    decodes: int = 0  # of them those that went to the op
    steps: int = 0  # of the calls those with one query token
    decoded_steps: int = 0
    options: dict[str, list[str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


@contextmanager
def watched(seen: Seen, *, spoilt: bool = False) -> Iterator[None]:
    """Adds to `seen`; can spoil what attention gives, to see whether a model's logits depend on it."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    attention, decode = functions[integration.NAME], lean_attention.decode
    op_calls = 0

    def counting(*args, **kwargs):
        nonlocal op_calls
        op_calls += 1
        return decode(*args, **kwargs)

    def recording(module, query, key, value, attention_mask, *args, **kwargs):
        before = op_calls
        out, *rest = attention(module, query, key, value, attention_mask, *args, **kwargs)
        is_step, went_to_op = query.shape[2] == 1, op_calls > before
        seen.calls += 1
        seen.decodes += went_to_op
        seen.steps += is_step
        seen.decoded_steps += is_step and went_to_op
        for name, option in kwargs.items():
            if option is None or option is False:
                continue
            texts = seen.options.setdefault(name, [])
            if len(texts) < 4 and described(option) not in texts:
                texts.append(described(option))
        return (out.flip(-1) if spoilt else out, *rest)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().removeprefix("lean_attention: ")
            if text not in seen.said:
                seen.said.append(text)

    listener, logger = Listener(), logging.getLogger(lean_attention.__name__)
    logger.addHandler(listener)
    lean_attention.decode = counting
    AttentionInterface.register(integration.NAME, recording)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        lean_attention.decode = decode
        AttentionInterface.register(integration.NAME, attention)


def few_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:100]}{'...' if len(text) > 100 else ''}"


def difference(got: Tensor, want: Tensor) -> float:
    """The largest one of two runs' logits, as a share of the largest logit."""
    known = want.isfinite()
    if not torch.equal(known, got.isfinite()):
        return math.inf
    got, want = got.where(known, 0), want.where(known, 0)
    return ((got - want).abs().max() / want.abs().max()).item()


def first_other_token(got: Tensor, want: Tensor) -> str:
    others = (got.argmax(-1) != want.argmax(-1)).any(dim=1)
    return f"token {int(others.int().argmax())}" if others.any() else "the same tokens"


def examine(family: str, tell: Callable[[str], None]) -> dict:
    """One family: {"outcome", "details", "options": {name: descriptions}}."""
    tell("building")
    eager = build(family, "eager")
    randomise(eager)
    config = eager.config.get_text_config(decoder=True)
    notes: list[str] = []
    try:
        ours = named(eager, integration.NAME)
    except Exception as error:
        traceback.print_exc()
        notes.append(f"not built with that name: {few_words(error)}")
        ours = copy.deepcopy(eager)
        ours.set_attn_implementation(integration.NAME)
    sdpa = None
    seen = Seen()
    cells: dict[str, list[tuple[str, str]]] = {}  # by what happened
    worst = (0.0, "")

    def run(model, cache, kind, tokens=(), pad=0):
        torch.manual_seed(1)
        return generate(model, prompts(PROMPTS[kind], pad), CACHES[cache](model, config), tokens)

    @functools.cache
    def wanted(cache, kind):
        """Tokens and logits of eager attention, or why there are none."""
        tell(f"eager, {cache}, {kind}")
        try:
            tokens, logits = run(eager, cache, kind)
            off = difference(run(eager, cache, kind, tokens)[1], logits)
        except Unsupported as reason:
            return str(reason)
        except Exception as error:
            traceback.print_exc()
            return f"eager fails: {few_words(error)}"
        if logits.isnan().any():
            return "eager gives NaN"
        return (tokens, logits) if off <= TOLERANCES[cache] else f"eager differs from itself by {off:.1g}"

    def compared(cache, kind) -> str:
        nonlocal sdpa, worst
        eager_cache, tolerance = EAGER_CACHES.get(cache, cache), TOLERANCES[cache]
        if isinstance(want := wanted(eager_cache, kind), str):
            return want
        tokens, want = want
        tell(f"{integration.NAME}, {cache}, {kind}")
        try:
            with watched(seen):
                got = run(ours, cache, kind, tokens)[1]
        except Unsupported as reason:
            return str(reason)
        except Exception as error:
            traceback.print_exc()
            return f"fails: {few_words(error)}"
        if (off := difference(got, want)) <= tolerance:
            if "same" not in cells and seen.calls:
                with watched(Seen(), spoilt=True):
                    if difference(run(ours, cache, kind, tokens)[1], want) < 10 * tolerance:
                        notes.append("the logits hardly depend on attention")
            return "same"
        with suppress(Exception):
            if difference(run(eager, eager_cache, kind, tokens, pad=ORDINARY[-1])[1], want) > tolerance:
                return "padding leaks"
        worst = max(worst, (off, f"by {off:.2g}, {first_other_token(got, want)}"))
        with suppress(Exception):  # not every family has sdpa
            sdpa = sdpa or named(eager, "sdpa")
            if difference(got, run(sdpa, eager_cache, kind, tokens)[1]) <= tolerance:
                return "as sdpa"
        return "differs"

    for cache, kind in itertools.product(CACHES, PROMPTS):
        what = compared(cache, kind)
        # Errors that differ in their numbers only are one.
        alike = (known for known in cells if re.sub(r"\d+", "", known) == re.sub(r"\d+", "", what))
        cells.setdefault(next(alike, what), []).append((cache, kind))
    return judged(seen, cells, worst[1], notes)


def judged(seen: Seen, cells: dict[str, list[tuple[str, str]]], worst: str, notes: list[str]) -> dict:
    """The outcome of all cells together: the worst."""
    fails = [what for what in cells if what.startswith("fails")]
    if "differs" in cells:
        outcome = "differs"
    elif fails:
        outcome = "fails"
    elif "as sdpa" in cells:
        outcome = "as sdpa"
    elif "padding leaks" in cells:
        outcome = "padding leaks"
    elif "same" not in cells:
        outcome = "not built"
    elif not seen.calls:
        outcome = "not reached"
    elif seen.said:
        outcome = "falls back"
    elif seen.decoded_steps < seen.steps:
        outcome = "silent"
    else:
        outcome = "op"
    details = [worst] if worst else []
    for what, where in cells.items():
        places = "; ".join(places_of(where))
        if len(cells) == 1 or what == "same":
            details += [what] if what not in ("same", outcome) else []
        else:
            details.append(f"in {places}" if what == outcome else f"{what} ({places})")
    if seen.calls:
        details.append(f"{seen.decoded_steps} of {seen.steps} steps, {seen.decodes} of {seen.calls} calls")
    details += [f"said: {text}" for text in seen.said]
    return {"outcome": outcome, "details": "; ".join(details + notes), "options": seen.options}


def places_of(cells: list[tuple[str, str]]) -> list[str]:
    """Whole rows and columns of the table of caches and prompts by their names, then single cells."""
    caches = [cache for cache in CACHES if all((cache, kind) in cells for kind in PROMPTS)]
    kinds = [kind for kind in PROMPTS if all((cache, kind) in cells for cache in CACHES)]
    rest = [f"{cache}, {kind}" for cache, kind in cells if cache not in caches and kind not in kinds]
    return caches + kinds + rest


def child(family: str, connection: Connection, verbose: bool) -> None:
    """Examines a family and sends what it does, then the result."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not verbose:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    integration.register(prefill="sdpa")  # not whichever a measurement finds faster
    with torch.no_grad():
        try:
            result = examine(family, connection.send)
        except Exception as error:
            traceback.print_exc()
            result = {"outcome": "not built", "details": few_words(error), "options": {}}
    connection.send(result)
    connection.close()


class Running:
    """A family in a process of its own."""

    def __init__(self, family: str, seconds: float, verbose: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rich.progress", integration.__name__])
        self.connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=child, args=(family, theirs, verbose))
        self._process.start()
        theirs.close()
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        self._stage = "starting"

    def result(self) -> dict | None:
        """None while it runs."""
        try:
            while self.connection.poll():
                news = self.connection.recv()
                if not isinstance(news, str):
                    self._process.join()
                    return news
                self._stage = news
        except EOFError:
            self._process.join()
            return self._ended(f"ends with exit code {self._process.exitcode}")
        if time.monotonic() < self._deadline:
            return None
        self._process.kill()
        self._process.join()
        return self._ended(f"takes over {self._seconds:g} s")

    def _ended(self, how: str) -> dict:
        outcome = "fails" if self._stage.startswith(integration.NAME) else "not built"
        return {"outcome": outcome, "details": f"{how} ({self._stage})", "options": {}}


def sweep(families: Sequence[str], seconds: float, jobs: int, verbose: bool = False) -> dict[str, dict]:
    """Results by family: some families at a time, each for some seconds at most."""
    results: dict[str, dict] = {}
    left, running = list(families), dict[str, Running]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(left))
        while left or running:
            while left and len(running) < jobs:
                family = left.pop(0)
                running[family] = Running(family, seconds, verbose)
                progress.update(bar, description=", ".join(running))
            wait([each.connection for each in running.values()], timeout=1.0)
            ended = {family: result for family, each in running.items() if (result := each.result())}
            for family, result in ended.items():
                del running[family]
                results[family] = result
                progress.console.print(f"{family}: {result['outcome']}", highlight=False)
                progress.advance(bar)
    return {family: results[family] for family in families}


def written(results: dict[str, dict]) -> str:
    """The results as text."""
    width = max(map(len, results), default=0)
    lengths = ", ".join(f"{kind} {lengths}" for kind, lengths in PROMPTS.items())
    allowed = [f"{tolerance:g} ({cache})" for cache, tolerance in TOLERANCES.items()]
    lines = [
        f"Every causal-LM family of transformers {transformers.__version__}, a tiny random model in float32:",
        f"greedy generation with {integration.NAME!r} against eager attention, {NEW_TOKENS} tokens.",
        f"Caches: {', '.join(CACHES)}. Prompts: {lengths}.",
        f"Logits may differ by {', '.join(allowed)} of the largest.",
        "",
        *(f"{outcome:14} {meaning}" for outcome, meaning in OUTCOMES.items()),
        "",
        *(f"{family:{width}}  {each['outcome']:14} {each['details']}" for family, each in results.items()),
        "",
        "Options passed to the attention function (neither None nor False): by which families, and values",
        *options_written(results),
        "",
        summary(results),
    ]
    return "".join(line.rstrip() + "\n" for line in lines)


def unknown_options(results: dict[str, dict]) -> list[str]:
    """Those on no list of the integration, which gives steps with them to the family's eager attention."""
    known = {"scaling", "dropout"} | KNOWN_OPTIONS | SCORE_OPTIONS | SELECTIONS
    return sorted({name for each in results.values() for name in each["options"]} - known)


def options_written(results: dict[str, dict]) -> Iterator[str]:
    passed: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}
    for family, each in results.items():
        for name, texts in each["options"].items():
            passed.setdefault(name, []).append(family)
            values.setdefault(name, []).extend(text for text in texts if text not in values.get(name, ()))
    unknown = unknown_options(results)
    for name, families in sorted(passed.items(), key=lambda item: (-len(item[1]), item[0])):
        flag = " (not known)" if name in unknown else ""
        who = ", ".join(families) if len(families) <= 8 else f"{len(families)} families"
        what = ", ".join(values[name][:3]) + (", ..." if len(values[name]) > 3 else "")
        yield f"{name}{flag}: {who}; {what}"


def summary(results: dict[str, dict]) -> str:
    counts = Counter(each["outcome"] for each in results.values())
    parts = [f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]]
    unknown = unknown_options(results)
    parts += [f"options not known: {', '.join(unknown)}"] if unknown else []
    versions = [f"{module.__name__} {module.__version__}" for module in (transformers, torch, lean_attention)]
    return f"{len(results)} families: {', '.join(parts)}; {', '.join(versions)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transformers_families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="families whose whole name matches")
    parser.add_argument("--seconds-per-family", type=float, default=180.0, metavar="N", help="time limit")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="families at a time")
    parser.add_argument("--output", type=Path, help=f"where to write the text (all families: {OUTPUT.name})")
    parser.add_argument("--verbose", action="store_true", help="what the families print, and tracebacks")
    options = parser.parse_args(arguments)
    families = [name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if name in CONFIG_MAPPING]
    if options.only:
        families = [name for name in families if re.fullmatch(options.only, name)]
    if not families:
        sys.exit(f"no family's name matches {options.only!r}")
    results = sweep(families, options.seconds_per_family, options.jobs, options.verbose)
    text = written(results)
    output = options.output or (None if options.only else OUTPUT)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    print(text, end="")
    if any(each["outcome"] in WRONG for each in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
