"""The command line as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lean_attention
from lean_attention.tools.command_line import main


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lean_attention", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


@pytest.mark.slow
def test_demo_prints_a_table_and_draws_the_schedule(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "schedule.png"
    small = ("--max-tokens", "2000", "--kv-heads", "2", "--heads", "8", "--context", "300")
    result = run("demo", *small, "--picture", str(picture))
    assert result.returncode == 0, result.stderr
    for text in (
        "bfloat16, 8 query heads, 2 KV heads",
        "8 from 15 to 2,000",
        "FlashDecoding (16 splits)",
        " splits, best)",
        "48 tokens, greedy",
        "ours, DynamicCache",
        "accelerate",
        "DEMO_ARGS=--text",
        str(picture),
    ):
        assert text in result.stdout
    assert result.stdout.count(" same ") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Warning" not in result.stderr


def test_info_names_versions_and_the_forced_instruction_set() -> None:
    result = run("info", LEAN_ATTENTION_CPU="portable")
    assert result.returncode == 0, result.stderr
    for text in (lean_attention.__version__, torch.__version__, "portable for bfloat16", "-std=c++20"):
        assert text in result.stdout


def test_bad_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        ((), "required: COMMAND"),
        (("dmo",), "invalid choice: 'dmo'"),
        (("demo", "--max-tokens", "0"), "'0' is not a positive whole number"),
        (("demo", "--threads", "many"), "'many' is not a positive whole number"),
        (("demo", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("demo", "--heads", "7", "--kv-heads", "2"), "--heads 7 is not a multiple of --kv-heads 2"),
        (("demo", "--head-dim", "20"), "--head-dim 20 is not a multiple of 8 up to 512"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code, arguments
        assert message in f"{ended.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize("command", ["demo", "info", "generate"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


def test_help_of_the_program() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "usage: python -m lean_attention" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "lean_attention, cache auto"),
        (("--kv-cache", "int8"), "lean_attention, cache int8"),
        (("--kv-cache", "transformers"), "lean_attention, cache transformers"),
        (("--attn", "sdpa"), "sdpa, cache transformers"),
    ],
    ids=["auto", "int8", "transformers", "sdpa"],
)
def test_generate_streams_text_from_a_local_model(
    tmp_path: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {
        "<unk>": 0,
        **{word: i for i, word in enumerate(["the", "cat", "sat", "on", "a", "mat"], start=1)},
    }
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    arguments = ("--model", str(tmp_path), "--prompt", "the cat sat", "--max-new-tokens", "5")
    main(["generate", *arguments, *options])
    printed = capsys.readouterr()
    assert printed.out.startswith("the cat sat")
    assert "[prompt: 3 tokens, " in printed.err and "new: 5 tokens, " in printed.err
    assert said in printed.err


def test_generate_says_that_a_model_cannot_be_had() -> None:
    pytest.importorskip("transformers")
    result = run("generate", "--model", "nobody/nothing", "--prompt", "x", HF_HUB_OFFLINE="1")
    assert result.returncode != 0
    assert "generate: 'nobody/nothing' is neither a directory with a model nor to be had" in result.stderr
    assert "Traceback" not in result.stderr


def test_generate_says_that_a_file_cannot_be_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match=r"none.gguf' is not a file"):
        main(["generate", "--gguf", str(tmp_path / "none.gguf"), "--prompt", "x"])
    (tmp_path / "bad.gguf").write_bytes(b"GGUF?")
    with pytest.raises(SystemExit, match="is not a model that transformers can read"):
        main(["generate", "--gguf", str(tmp_path / "bad.gguf"), "--prompt", "x"])
