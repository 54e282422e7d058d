"""The sweep over transformers' families, on two of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_line_a_family_and_a_summary(tmp_path: Path) -> None:
    output = tmp_path / "new" / "families.txt"
    arguments = ["--only", "llama|doge", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.transformers_families", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    text = output.read_text()
    assert run.stdout == text
    assert re.search(r"^llama +op +(\d+) of \1 steps", text, re.MULTILINE)
    assert re.search(r"^doge +falls back .*said: .*DogeAttention", text, re.MULTILINE)
    assert re.search(r"^use_cache: doge, llama; True$", text, re.MULTILINE)
    assert text.splitlines()[-1].startswith("2 families: 1 op, 1 falls back; transformers ")


def test_a_family_that_is_not_there_is_named() -> None:
    from benchmarks.transformers_families import main

    with pytest.raises(SystemExit, match="no family's name matches 'lama'"):
        main(["--only", "lama"])
