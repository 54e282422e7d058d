"""The command line of `python -m lean_attention`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m lean_attention", description=sys.modules["lean_attention"].__doc__
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, backends, instruction sets, threads, build flags")
    info.set_defaults(run=run_info)

    demo = commands.add_parser(
        "demo",
        help="decode a ragged batch: correctness, speed and a picture of the schedule",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    demo.add_argument("--heads", type=positive, default=32, metavar="N", help="query heads")
    demo.add_argument("--kv-heads", type=positive, default=8, metavar="N", help="KV heads")
    demo.add_argument("--head-dim", type=positive, default=128, metavar="N", help="a multiple of 8 up to 512")
    demo.add_argument(
        "--max-tokens",
        type=positive,
        default=65536,
        metavar="N",
        help="longest sequence; less if a quarter of the free memory does not hold the batch",
    )
    demo.add_argument(
        "--context", type=positive, default=6000, metavar="N", help="prompt of the generation at the end"
    )
    demo.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    demo.add_argument(
        "--ctas", type=positive, default=264, metavar="N", help="grid of the picture; an H200 has 2 * 132"
    )
    demo.add_argument(
        "--picture", type=Path, default=Path("demo-output/schedule.png"), metavar="PATH", help="PNG to write"
    )
    demo.add_argument(
        "--text",
        action="store_true",
        help="instead: a real model of 135 million parameters reads a long text, and what a token costs",
    )
    demo.set_defaults(run=run_demo)

    generate = commands.add_parser(
        "generate",
        help="continue a text with a transformers model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a directory, or a name on the Hugging Face hub"
    )
    source.add_argument("--gguf", type=Path, metavar="FILE", help="a model in GGUF's format")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=positive, default=100, metavar="N", help="tokens to add")
    generate.add_argument(
        "--attn", choices=["lean_attention", "sdpa", "eager"], default="lean_attention", help="attention"
    )
    generate.add_argument(
        "--kv-cache",
        choices=["auto", "int8", "float8_e4m3fn", "transformers"],
        default="auto",
        help="what is cached: the model's dtype or quantised, by this package's cache; or transformers' own "
        "(which it is with another attention)",
    )
    generate.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="of the weights"
    )
    generate.set_defaults(run=run_generate)
    return top


def run_generate(arguments: argparse.Namespace) -> None:
    from lean_attention.tools.generation import generate

    generate(
        arguments.model,
        arguments.prompt,
        arguments.max_new_tokens,
        arguments.attn,
        arguments.dtype,
        arguments.kv_cache,
        arguments.gguf,
    )


def run_info(_arguments: argparse.Namespace) -> None:
    from lean_attention.tools.info import describe

    print(describe())


def run_demo(arguments: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"demo: {error.name} is not installed; install it with: pip install 'lean_attention[demo]'")
    import torch

    from lean_attention.tools.demo import DemoShape, run

    if arguments.heads % arguments.kv_heads:
        sys.exit(f"demo: --heads {arguments.heads} is not a multiple of --kv-heads {arguments.kv_heads}")
    if arguments.head_dim % 8 or arguments.head_dim > 512:
        sys.exit(f"demo: --head-dim {arguments.head_dim} is not a multiple of 8 up to 512")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.text:
        from lean_attention.tools import text_demo

        return text_demo.main()
    dtype = getattr(torch, arguments.dtype)
    shape = DemoShape(dtype, arguments.heads, arguments.kv_heads, arguments.head_dim)
    with torch.inference_mode():
        run(shape, arguments.max_tokens, arguments.ctas, arguments.picture, arguments.context)


def main(command_line: list[str] | None = None) -> None:
    arguments = parser().parse_args(command_line)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
