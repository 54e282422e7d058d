"""What a server's users wait for, in vLLM with this package's attention and with vLLM's own.

    python -m benchmarks.vllm_serve --requests 4 --prompt 4096
    python -m benchmarks.vllm_serve --requests 16 --prompt 4096 --common 4000

With `--common`, prompts begin with the same tokens, and prefix caching is on.
The model is a Llama with random weights and KV heads of 128. Each contender is an engine in a process of its
own; they take turns, one batch of requests each, so that a busy machine disturbs both alike. Medians over the
rounds are told. `--no-amx` leaves AMX unused, by either attention and by the matrix products around them, as
on a CPU that has none. It needs an environment with vLLM (`make test-vllm` makes one).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from itertools import pairwise
from multiprocessing.connection import Connection

HEAD_DIM = 128
VOCABULARY = 1024
BLOCK_SIZE = 128
CONTENDERS = {"lean_attention": "1", "vLLM's own": "0"}
ATTENTION = {"lean_attention": "LeanAttentionImpl", "vLLM's own": "CPUAttentionBackendImpl"}


def save_config(folder: str, options: argparse.Namespace) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=options.prompt + options.new,
        dtype=options.dtype,
    ).save_pretrained(folder)


def serve(connection: Connection, folder: str, variable: str, options: argparse.Namespace) -> None:
    """One contender: answers each seed with the measurements of a batch of requests."""
    os.environ |= {"LEAN_ATTENTION_VLLM": variable, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # The other contender has its turn on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options.no_amx:
        # (Cores that have AMX convert bf16 to fp32 where they may not use it; see csrc/cpu/tuning.h.)
        os.environ |= {"LEAN_ATTENTION_CPU": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
        import torch

        torch.cpu._is_amx_tile_supported = lambda: False  # what vLLM asks
    from vllm import LLM

    blocks = options.requests * (-(-(options.prompt + options.new) // BLOCK_SIZE) + 1)
    bytes_per_number = 4 if options.dtype == "float32" else 2
    bytes_per_block = BLOCK_SIZE * options.layers * options.kv_heads * 2 * HEAD_DIM * bytes_per_number
    llm = LLM(
        folder,
        dtype=options.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=options.common > 0,
        max_model_len=options.prompt + options.new,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=(blocks + 1) * bytes_per_block,
    )
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    connection.send({type(layer.impl).__name__ for layer in layers})
    while (seed := connection.recv()) is not None:
        connection.send(measure(llm, seed, options))


def measure(llm, seed: int, options: argparse.Namespace) -> dict[str, float]:
    import torch
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(seed)
    sampling = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True, detokenize=False)
    engine = llm.llm_engine

    def tokens_of(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    common = tokens_of(options.common)
    for request in range(options.requests):
        tokens = common + tokens_of(options.prompt - options.common)
        engine.add_request(f"{seed}-{request}", {"prompt_token_ids": tokens}, sampling)
    begin = time.perf_counter()
    at: dict[str, list[float]] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            seen = at.setdefault(output.request_id, [])
            seen += [now] * (len(output.outputs[0].token_ids) - len(seen))
    # From here on every step has one token of each request.
    all_started = max(times[0] for times in at.values())
    end = max(times[-1] for times in at.values())
    gaps = [
        after - before for times in at.values() for before, after in pairwise(times) if before >= all_started
    ]
    return {
        "prompt tokens/s": options.requests * options.prompt / all_started,
        "new tokens/s": len(gaps) / (end - all_started),
        "ms between tokens": 1000 * statistics.median(gaps),
        "ms between tokens, worst of 20": 1000 * statistics.quantiles(gaps, n=20)[-1],
    }


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        save_config(folder, options)
        engines = {}
        for name, variable in CONTENDERS.items():
            here, there = spawn.Pipe()
            process = spawn.Process(target=serve, args=(there, folder, variable, options))
            process.start()
            there.close()
            engines[name] = here, process
            attention = here.recv()
            if attention != {ATTENTION[name]}:
                raise SystemExit(f"{name}: the layers have {attention}; is lean_attention installed here?")
        for round_ in range(options.rounds + 1):
            for name, (connection, _) in engines.items():
                connection.send(round_)
                result = connection.recv()
                if round_:  # the first one warms up
                    found[name].append(result)
        for connection, process in engines.values():
            connection.send(None)
            process.join()
    return {
        name: {quantity: statistics.median(each[quantity] for each in results) for quantity in results[0]}
        for name, results in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("layers", 4, "of the model"),
        ("hidden", 2048, "size of the model"),
        ("heads", 32, f"query heads, of {HEAD_DIM}"),
        ("kv-heads", 8, f"KV heads, of {HEAD_DIM}"),
        ("requests", 4, "at once"),
        ("prompt", 4096, "tokens of each prompt"),
        ("common", 0, "tokens that all prompts begin with"),
        ("new", 32, "tokens that each request generates"),
        ("rounds", 3, "that are measured"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--no-amx", action="store_true", help="as on a CPU without AMX")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    if not 0 <= options.common < options.prompt:
        parser.error(f"--common is {options.common}; it must be from 0 to {options.prompt - 1}")
    results = run(options)
    print(
        f"{options.layers} layers, {options.heads} query heads and {options.kv_heads} KV heads of {HEAD_DIM}"
        f", {options.dtype}; {options.requests} requests of {options.prompt:,} tokens, {options.new} new each"
        + (f"; the first {options.common:,} are common" if options.common else "")
        + ("; without AMX" if options.no_amx else "")
    )
    ours, own = results.values()
    print(f"{'':32}" + "".join(f"{name:>16}" for name in results) + f"{'ratio':>8}")
    for quantity in ours:
        print(
            f"{quantity:32}{ours[quantity]:16.1f}{own[quantity]:16.1f}{ours[quantity] / own[quantity]:8.2f}"
        )


if __name__ == "__main__":
    main()
