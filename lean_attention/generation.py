"""Text from a language model with a chosen attention: the command `generate`, and the demo's end."""

from __future__ import annotations

import inspect
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_attention import reference

ATTENTION = ("lean_attention", "sdpa", "eager")


def generate(model: str, prompt: str, max_new_tokens: int, attention: str, dtype: str) -> None:
    """Streams a continuation of `prompt` to the terminal, then tells its speed.

    Args:
        model: a directory with a transformers model, or its name on the Hugging Face hub.
        attention: one of `ATTENTION`.
        dtype: "auto" for what the model was saved in, or a torch dtype's name.

    Exits with one line where the model cannot be had.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

        from lean_attention.integrations.transformers import register
    except ImportError as error:
        sys.exit(f"generate: {error}")
    register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        sys.exit(
            f"generate: {model!r} is neither a directory with a model nor to be had from the Hugging Face "
            f"hub (is there a network?): {reason}"
        )
    lm = lm.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(prompt, return_tensors="pt").to(lm.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        tokens = lm.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - begin
    new = tokens.shape[1] - inputs["input_ids"].shape[1]
    print(
        f"[{new} tokens after {inputs['input_ids'].shape[1]} in {seconds:.1f} s, prefill included: "
        f"{new / seconds:.1f} tokens/s with {attention} on {lm.device}]",
        file=sys.stderr,
    )


@dataclass(frozen=True)
class Generation:
    """What one attention made of a prompt, after the prefill."""

    tokens: list[int]
    seconds: float
    seconds_in_attention: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


class Timed:
    """An attention implementation of transformers that measures itself."""

    def __init__(self, implementation) -> None:
        self._implementation = implementation
        self.seconds = 0.0

    def __call__(self, *arguments, **options):
        begin = time.perf_counter()
        result = self._implementation(*arguments, **options)
        self.seconds += time.perf_counter() - begin
        return result


def prompt_bytes(tokens: int) -> Tensor:
    """A text to go on from, a token per byte: this package's definition of attention, repeated."""
    text = inspect.getsource(reference).encode()
    text = text * (tokens // len(text) + 1)
    return torch.tensor([list(text[:tokens])])


def small_llama() -> torch.nn.Module:
    """A Llama with random weights, the same each time, for bytes as tokens: 28 million parameters, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def cache_argument(model: torch.nn.Module) -> str:
    """What the model's forward calls its cache: transformers renamed past_key_values to cache in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def compare(context: int, new_tokens: int) -> dict[str, Generation]:
    """Greedy decoding of the same model and prompt with "sdpa" and with "lean_attention"."""
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from lean_attention.integrations.transformers import register

    register()
    model, prompt = small_llama(), prompt_bytes(context)
    cache = cache_argument(model)
    names = ("sdpa", "lean_attention")
    timers, caches, steps, tokens = {}, {}, {}, {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for name in names:
        timers[name] = Timed(ALL_ATTENTION_FUNCTIONS[name])
        AttentionInterface.register(f"timed_{name}", timers[name])
        AttentionMaskInterface.register(f"timed_{name}", sdpa_mask)
        model.set_attn_implementation(f"timed_{name}")
        caches[name] = DynamicCache(config=model.config)
        steps[name] = model(prompt, **{cache: caches[name]}, use_cache=True, logits_to_keep=1)
        timers[name].seconds = 0.0
    for _ in range(new_tokens):
        for name in names:  # in turn, so that a busy machine disturbs both alike
            model.set_attn_implementation(f"timed_{name}")
            begin = time.perf_counter()
            next_token = steps[name].logits[:, -1:].argmax(dim=-1)
            tokens[name].append(int(next_token))
            steps[name] = model(next_token, **{cache: caches[name]}, use_cache=True)
            seconds[name] += time.perf_counter() - begin
    return {name: Generation(tokens[name], seconds[name], timers[name].seconds) for name in names}
