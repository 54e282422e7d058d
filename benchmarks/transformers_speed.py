"""What transformers' users wait for: the first token of a prompt, and each token after a long context.

    python -m benchmarks.transformers_speed

The model is a Llama with random weights in bfloat16: 32 query heads, 8 KV heads of 128. The contenders take
turns, so that a busy machine disturbs all alike; medians are told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import print_whole, table_of
from lean_attention.integrations.transformers import CACHE_PARAMETER, register
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
    add("--output", type=Path, metavar="PATH", help="a text file to write as well")
    options = parser.parse_args(arguments)
    register()
    console = Console()
    model = generation.random_llama(torch.bfloat16, **LONG_LLAMA, num_hidden_layers=options.layers)
    tables = [prompts_table(model, options.prompts, options.rounds)]
    tables.append(steps_table(model, options.contexts, options.steps, console))
    for table in tables:
        print_whole(table, console)
    if options.output is not None:
        with options.output.open("w") as file:
            for table in tables:
                print_whole(table, Console(file=file))


if __name__ == "__main__":
    main()
