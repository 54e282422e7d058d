"""Several sequences from one prompt: beams, and ``num_return_sequences``.

`generate` repeats a prompt's rows before the model sees them. A model that `accelerate` has changed reads
each prompt once, and repeats its outputs afterwards. From then on a step reads the tokens of a prompt once
for all its sequences: the layers of full attention tell how many adjoining rows begin alike. On a CPU they
keep these tokens once (prompt_pages.py); other layers repeat them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

# Arguments of decoders that have a row for each sequence.
_BY_ROW = {"input_ids": 2, "inputs_embeds": 3, "attention_mask": 2, "position_ids": 2}
_ATTRIBUTE = "lean_attention_prompt"


@dataclass(frozen=True)
class Prompt:
    """What rows of a cache have in common: each `sequences` neighbours their first `tokens`."""

    sequences: int
    tokens: int


def mark(keys: Tensor, prompt: Prompt | None) -> Tensor:
    """Has the keys of a step tell what their rows have in common."""
    if prompt is not None and prompt.tokens > 0:
        setattr(keys, _ATTRIBUTE, prompt)
    return keys


def shared_rows(keys: Tensor, most: int) -> Tensor | None:
    """The argument `shared` of decode, where keys tell of a prompt; of its first `most` tokens at most."""
    prompt: Prompt | None = None if torch.compiler.is_compiling() else getattr(keys, _ATTRIBUTE, None)
    if prompt is None or keys.device.type != "cpu" or min(prompt.tokens, most) < 1:
        return None
    return _rows(len(keys), prompt.sequences, min(prompt.tokens, most))


@functools.lru_cache(maxsize=16)
def _rows(batch: int, sequences: int, tokens: int) -> Tensor:
    with torch.inference_mode(False):  # it outlives the call
        first = torch.arange(0, batch, sequences, dtype=torch.int32, device="cpu")
        begin = torch.zeros_like(first)
        return torch.stack([first, first + sequences, begin, begin + tokens], dim=1)


def once_per_prompt(cache: Cache, arguments: dict) -> dict | None:
    """The arguments of a decoder with a row for each prompt; ``None`` where its rows are no repetitions.

    `arguments` are those of a first step, with ``cache.sequences_per_prompt`` rows for each prompt.
    """
    repeats = cache.sequences_per_prompt
    rows = None
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(arguments.get(name), Tensor):
            rows = len(arguments[name])
    if rows is None or rows % repeats:
        return None
    changed = {}
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            if isinstance(value, (dict, list, tuple)) and value:
                return None  # it may hold rows
            continue
        if value.dim() == 0 or len(value) != rows:
            continue
        if _BY_ROW.get(name) != value.dim():
            return None
        each = value.view(rows // repeats, repeats, *value.shape[1:])
        if not torch.equal(each, each[:, :1].expand_as(each)):
            return None
        changed[name] = value[::repeats]
    return {**arguments, **changed}


def repeated(output: object, prompts: int, repeats: int) -> object:
    """A decoder's output with `repeats` rows in the place of each of `prompts`; caches stay as they are."""
    if isinstance(output, Tensor):
        by_row = output.dim() > 0 and len(output) == prompts
        return output.repeat_interleave(repeats, dim=0) if by_row else output
    if isinstance(output, dict):  # a ModelOutput
        for name, value in list(output.items()):
            output[name] = repeated(value, prompts, repeats)
        return output
    if isinstance(output, (list, tuple)):
        return type(output)(repeated(value, prompts, repeats) for value in output)
    return output
