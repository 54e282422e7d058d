"""What the README and the pages show is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lean_attention
from lean_attention import reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/results/README.md"])
README = (ROOT / "README.md").read_text()
FEATURES = (ROOT / "docs" / "features.md").read_text()
COMPILERS = (ROOT / "docs" / "compilers.md").read_text()
TRANSFORMERS = (ROOT / "docs" / "transformers.md").read_text()


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.S)


BLOCKS = code_blocks(README)


def test_the_decoder_layer_runs() -> None:
    (code,) = [block for block in BLOCKS if "class DecodeAttention" in block]
    names: dict = {}
    exec(code, names)
    k_cache, v_cache = torch.randn(2, 30, 2, 64), torch.randn(2, 30, 2, 64)
    q, k_new, v_new = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64), torch.randn(2, 1, 2, 64)
    lens = torch.tensor([7, 0], dtype=torch.int32)
    out = names["DecodeAttention"]()(q, k_new, v_new, k_cache, v_cache, lens)
    assert torch.equal(k_cache[0, 7], k_new[0, 0])
    want, _ = reference.decode(q, k_cache, v_cache, lens + 1)
    assert torch.allclose(out, want.float(), atol=1e-6)


def test_the_schedule_prints_as_shown() -> None:
    (block,) = [block for block in BLOCKS if block.startswith(">>> print(")]
    call, shown = block.split("\n", 1)
    schedule = eval(call.removeprefix(">>> print(").removesuffix(")"), {"lean_attention": lean_attention})
    assert str(schedule) == shown.strip()


def test_the_features_run_in_order() -> None:
    names: dict = {}
    for block in code_blocks(FEATURES):
        exec(block, names)
        if "lse" in names:
            assert names["out"].isfinite().all()


def test_the_compilers_page_runs() -> None:
    names: dict = {}
    lengths = [[7, 300], [10, 303], [10, 303]]  # after each block: setting up, compiled steps, exporting
    *blocks, graphs = code_blocks(COMPILERS)
    for block, want in zip(blocks, lengths, strict=True):
        exec(block, names)
        assert names["seq_lens"].tolist() == want
    q, k_cache, v_cache = (names[name].cpu() for name in ("q", "k_cache", "v_cache"))
    want, _ = reference.decode(q, k_cache, v_cache, names["seq_lens"].cpu())
    torch.testing.assert_close(names["out"].cpu().double(), want, atol=0.02, rtol=0.02)
    exec(graphs, names)
    if torch.cuda.is_available():
        assert names["seq_lens"].tolist() == [403, 3]


def test_the_transformers_page_runs() -> None:
    pytest.importorskip("transformers")
    *one_model, generate_batch = code_blocks(TRANSFORMERS)
    names: dict = {}
    for block in one_model:
        exec(block, names)
    assert names["tokens"].shape == (2, 15)
    assert names["cache"].get_seq_length() == 5
    assert names["model"].config._attn_implementation == "lean_attention"
    names = {}
    exec(generate_batch, names)
    assert [len(tokens) for tokens in names["tokens"]] == [10, 10]


def test_the_other_calls_of_the_readme_run() -> None:
    transformers = pytest.importorskip("transformers")
    calls = [block for block in BLOCKS if "class DecodeAttention" not in block and ">>>" not in block]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    names: dict = {
        "lean_attention": lean_attention,
        "q": torch.randn(2, 1, 8, 64),
        "k_new": torch.randn(2, 1, 2, 64),
        "v_new": torch.randn(2, 1, 2, 64),
        "k_cache": torch.randn(2, 30, 2, 64),
        "v_cache": torch.randn(2, 30, 2, 64),
        "k_pages": torch.randn(6, 16, 2, 64),
        "v_pages": torch.randn(6, 16, 2, 64),
        "seq_lens": torch.tensor([7, 0], dtype=torch.int32),
        "block_table": torch.tensor([[5, 1], [0, 3]], dtype=torch.int32),
        "model": transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)),
    }
    for block in calls:
        exec(block, names)
    assert names["out"].shape == (2, 1, 8, 64)
    assert names["model"].config._attn_implementation == "lean_attention"


def test_all_variables_are_on_their_page() -> None:
    folders = [ROOT / name for name in ("lean_attention", "csrc", "release", "benchmarks", "tests", ".ci")]
    files = [
        ROOT / "setup.py",
        ROOT / "Makefile",
        *(file for folder in folders for file in folder.rglob("*")),
    ]
    sources = [file for file in files if file.is_file() and file.suffix in ("", ".py", ".cpp", ".h", ".cu")]
    found = {name for file in sources for name in re.findall(r"\bLEAN_ATTENTION_[A-Z_]+\b", file.read_text())}
    page = (ROOT / "docs" / "environment.md").read_text()
    assert found == set(re.findall(r"\bLEAN_ATTENTION_[A-Z_]+\b", page))


def anchors(page: str) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    links = [
        (page, *link.partition("#"))
        for page in PAGES
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())
    ]
    assert len(links) > 20
    for page, path, _, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {path}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: {path}#{anchor}"


def test_pages_stay_short() -> None:
    words = {page.name: len(page.read_text().split()) for page in (ROOT / "docs").glob("*.md")}
    assert max(words.values()) <= 1000, words
    assert sum(words.values()) <= 9000, words
    assert len(README.splitlines()) <= 130
