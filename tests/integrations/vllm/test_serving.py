"""The installed plugin in vLLM's OpenAI-compatible server, whose engine is a process of its own."""

from __future__ import annotations

import json
import os
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
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING", "LEAN_ATTENTION_VLLM")
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    options = "--dtype float32 --enforce-eager --max-model-len 256 --kv-cache-memory-bytes 16M --port"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, *options.split(), str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**inherited, "VLLM_HOST_IP": "127.0.0.1"},
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
    assert text.count("serves attention") == 1, text
