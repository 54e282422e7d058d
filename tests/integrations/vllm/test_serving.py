"""What docs/vllm.md shows, with the installed plugin: engine and worker are processes of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integrations.vllm.engines import NEW_TOKENS, engine, generate, prompts, save_model, tokens_of

START_SECONDS = 240
ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "vllm.md").read_text()
NAME = "NAME_OR_PATH"


def shown(language: str, what: str) -> str:
    """The one block of the page in a language that has some text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    (block,) = [block for block in blocks if what in block]
    return block


def environment() -> dict[str, str]:
    """As a user has it, without what conftest.py sets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING", "LEAN_ATTENTION_VLLM")
    }
    return {**kept, "VLLM_HOST_IP": "127.0.0.1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "LlamaConfig")


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address, and the file that its log goes to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    _, *arguments = shlex.split(shown("sh", NAME).replace(NAME, model))
    command = [sys.executable, *arguments, "--port", str(port)]
    options = (
        "--dtype float32 --enforce-eager --max-model-len 256 --kv-cache-memory-bytes 16M "
        "--distributed-executor-backend mp"
    )
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, *options.split()], stdout=out, stderr=subprocess.STDOUT, env=environment()
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(address):
            ended = process.poll() is not None
            assert not ended and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address, log
    finally:
        process.terminate()
        process.wait(60)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def streamed(address: str, model: str, prompt: list[int]) -> list[int]:
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    call = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(request).encode(),
        {"Content-Type": "application/json"},
    )
    tokens: list[int] = []
    with urllib.request.urlopen(call, timeout=120) as response:
        for line in response:
            event = line.decode().removeprefix("data: ").strip()
            if event and event != "[DONE]":
                for choice in json.loads(event)["choices"]:
                    tokens += choice["token_ids"]
    return tokens


def test_concurrent_streams(server: tuple[str, Path], model: str) -> None:
    address, log = server
    lengths = (3, 40, 100, 17, 1, 64, 33, 90)
    asked = prompts(seed=5, lengths=lengths)
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda prompt: streamed(address, model, prompt), asked))
    with engine(model, ours=False) as llm:
        assert found == tokens_of(generate(llm, asked))
    text = log.read_text()
    (line,) = (line for line in text.splitlines() if "serves attention" in line)
    assert line.startswith("(Worker"), text


def test_script_of_the_page(model: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(shown("python", NAME).replace(NAME, model))
    done = subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_SECONDS,
        env={**environment(), "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("serves attention") == 1, done.stdout


def test_comparison_of_the_page() -> None:
    (line,) = (line for line in shown("sh", "vllm_serve").splitlines() if "vllm_serve" in line)
    small = "--prompt 40 --new 4 --rounds 1 --layers 1 --hidden 256 --heads 4 --kv-heads 2 --dtype float32"
    _, *arguments = shlex.split(line)
    done = subprocess.run(
        [sys.executable, *arguments, *small.split()],
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    requests = arguments[arguments.index("--requests") + 1]
    assert f"{requests} requests of 40 tokens" in done.stdout
    assert "ms between tokens" in done.stdout
