"""What transformers' users wait for: the first token of a prompt, and each token after a long context.

    python -m benchmarks.transformers_speed
    python -m benchmarks.transformers_speed --only samples

The samples are of one prompt, as beams are; caches are counted with the memory that they have in reserve.

The model is a Llama with random weights in bfloat16: 32 query heads, 8 KV heads of 128. The contenders take
turns, so that a busy machine disturbs all alike; medians are told.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks.report import print_whole, table_of
from lean_attention.integrations.transformers import CACHE_PARAMETER, LeanCache, accelerate, register
from lean_attention.tools import generation
from lean_attention.tools.command_line import positive
from lean_attention.tools.generation import Contender, contenders
from lean_attention.tools.text_demo import LONG_LLAMA, long_contenders, milliseconds_after


@torch.inference_mode()
def seconds_to_first_token(
    model, prompt_tokens: int, all_contenders: list[Contender], rounds: int
) -> dict[str, float]:
    """Median time of a pass over a prompt of random tokens into a new cache."""
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens))
    seconds: dict[str, list[float]] = {each.name: [] for each in all_contenders}
    for _ in range(rounds):
        for each in all_contenders:
            model.set_attn_implementation(each.attention)
            model(
                prompt[:, :64], use_cache=False, logits_to_keep=1
            )  # what is measured once, is measured here
            begin = time.perf_counter()
            cache = each.new_cache(model.config)
            logits = model(prompt, use_cache=True, logits_to_keep=1, **{CACHE_PARAMETER: cache}).logits
            int(logits.argmax())
            seconds[each.name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def prompts_table(model, lengths: list[int], rounds: int) -> Table:
    sdpa, _, *lean = contenders("auto", "int8")
    columns = {length: seconds_to_first_token(model, length, [sdpa, *lean], rounds) for length in lengths}
    table = table_of(
        f"seconds to the first token, {model.config.num_hidden_layers} layers;\n"
        "in brackets how many times as fast as sdpa",
        "attention and cache",
        tuple(f"{length:,} tokens" for length in lengths),
    )
    for each in [sdpa, *lean]:
        cells = (
            f"{times[each.name]:.2f} ({times[sdpa.name] / times[each.name]:.2f})"
            for times in columns.values()
        )
        table.add_row(each.name, *cells)
    return table


def steps_table(model, contexts: list[int], steps: int, console: Console) -> Table:
    columns = milliseconds_after(model, contexts, steps, console)
    table = table_of(
        f"milliseconds per token, {model.config.num_hidden_layers} layers",
        "attention and cache",
        tuple(f"after {context:,}" for context in columns),
    )
    for each in long_contenders(1):
        table.add_row(each.name, *(f"{column[each.name]:.1f}" for column in columns.values()))
    return table


@dataclass
class Several(LogitsProcessor):
    """Sequences that were generated from one prompt; as a processor of logits it sees when a step ends."""

    ends: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds
    rate: list[float] = field(default_factory=list)  # tokens of all sequences a second
    cache_bytes: int = 0

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ends.append(time.perf_counter())
        return scores

    def generate(self, model, prompt: torch.Tensor, config: GenerationConfig, **cache) -> None:
        self.ends.clear()
        begin = time.perf_counter()
        out = model.generate(
            prompt, generation_config=config, logits_processor=LogitsProcessorList([self]), **cache
        )
        steps, seconds = len(self.ends) - 1, self.ends[-1] - self.ends[0]
        self.first.append(self.ends[0] - begin)
        self.rate.append(max(config.num_return_sequences, config.num_beams) * steps / seconds)
        saved = io.BytesIO()
        torch.save(getattr(out, CACHE_PARAMETER), saved)  # each storage once, with its reserve
        self.cache_bytes = saved.tell()


def samples_table(model, prompt_tokens: int, sequences: int, beams: bool, new: int, rounds: int) -> Table:
    """Sequences of one prompt, by transformers alone, by `accelerate`, and by it with no prompt in common."""
    prompt = torch.randint(1, model.config.vocab_size, (1, prompt_tokens))  # 0 would count as padding
    model.generation_config.eos_token_id = None
    config = GenerationConfig(
        max_new_tokens=new,
        do_sample=not beams,
        num_return_sequences=sequences,
        num_beams=sequences if beams else 1,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    results = {name: Several() for name in ("sdpa, DynamicCache", "accelerate, each its own", "accelerate")}
    transformers, each_its_own, ours = results.values()
    for _ in range(rounds):
        model.set_attn_implementation("sdpa")
        transformers.generate(model, prompt, config)
        accelerate(model)
        model(prompt[:, :64], use_cache=False, logits_to_keep=1)  # what is measured once, is measured here
        each_its_own.generate(model, prompt, config, **{CACHE_PARAMETER: LeanCache(model.config)})
        ours.generate(model, prompt, config)
        accelerate(model, kv_cache=None)
    table = table_of(
        f"{sequences} {'beams' if beams else 'samples'} of one prompt of {prompt_tokens:,} tokens, "
        f"{new} new ones each, {model.config.num_hidden_layers} layers",
        "attention and cache",
        ("s to the first", "tokens/s", "cache MB"),
    )
    for name, each in results.items():
        first, rate = statistics.median(each.first), statistics.median(each.rate)
        table.add_row(name, f"{first:.2f}", f"{rate:.1f}", f"{each.cache_bytes / 1e6:.1f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=positive, nargs="+", default=[1024, 4096, 12288], metavar="N", help="their tokens")
    add("--contexts", type=positive, nargs="+", default=[8192, 32768], metavar="N", help="their tokens")
    add("--layers", type=positive, default=4, metavar="N", help="of the model (default: 4)")
    add("--rounds", type=positive, default=3, metavar="N", help="passes over each prompt (default: 3)")
    add("--steps", type=positive, default=9, metavar="N", help="tokens after each context (default: 9)")
    add(
        "--sequences",
        type=positive,
        default=8,
        metavar="N",
        help="samples, and beams, of one prompt (default: 8)",
    )
    add("--sampled", type=positive, default=4096, metavar="N", help="tokens of that prompt (default: 4096)")
    add("--new", type=positive, default=32, metavar="N", help="tokens of each sequence (default: 32)")
    add("--only", choices=("prompts", "steps", "samples"), help="one of the studies")
    add("--output", type=Path, metavar="PATH", help="a text file to write as well")
    options = parser.parse_args(arguments)
    if options.new < 2:
        parser.error(f"--new is {options.new}; tokens a second need 2 at least")
    register()
    console = Console()
    model = generation.random_llama(torch.bfloat16, **LONG_LLAMA, num_hidden_layers=options.layers)
    tables = []
    if options.only in (None, "prompts"):
        tables.append(prompts_table(model, options.prompts, options.rounds))
    if options.only in (None, "steps"):
        tables.append(steps_table(model, options.contexts, options.steps, console))
    if options.only in (None, "samples"):
        several = options.sampled, options.sequences
        for beams in (False, True):
            tables.append(samples_table(model, *several, beams, options.new, options.rounds))
    for table in tables:
        print_whole(table, console)
    if options.output is not None:
        with options.output.open("w") as file:
            for table in tables:
                print_whole(table, Console(file=file))


if __name__ == "__main__":
    main()
