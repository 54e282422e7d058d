"""What decoder_layer.cpp needs, into a folder: an exported decoder layer and the program.

    python examples/cpp/export.py FOLDER && FOLDER/decoder_layer OPS_LIBRARY FOLDER/layer.pt2

Prints the second command with its paths; the library is the one that Python uses too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

import lean_attention
from lean_attention._core import library

HERE = Path(__file__).resolve().parent


class DecoderLayer(torch.nn.Module):
    """The attention of a layer, with its hidden states as queries."""

    def forward(self, hidden, k_cache, v_cache, seq_lens):
        q = hidden.view(hidden.shape[0], 1, 8, 32)
        out, _ = lean_attention.decode(q, k_cache, v_cache, seq_lens)
        return hidden + out.reshape(hidden.shape)


def export(folder: Path) -> str:
    """A package for caches of any length."""
    tokens = torch.export.Dim("tokens", min=2, max=65536)
    caches = [torch.randn(2, 64, 2, 32) for _ in range(2)]
    with torch.no_grad():
        exported = torch.export.export(
            DecoderLayer(),
            (torch.randn(2, 1, 256), *caches, torch.tensor([5, 9], dtype=torch.int32)),
            dynamic_shapes=(None, {1: tokens}, {1: tokens}, None),
        )
    return torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "layer.pt2"))


def build_program(folder: Path) -> Path:
    program, libraries = folder / "decoder_layer", cpp_extension.library_paths()
    command = ["c++", "-std=c++20", "-O1", str(HERE / "decoder_layer.cpp"), "-o", str(program)]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [part for path in libraries for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    return program


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    package = export(folder)
    print(build_program(folder), library, package)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
