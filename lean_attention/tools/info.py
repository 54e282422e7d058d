"""What this installation is and what it can run, for people and for bug reports."""

from __future__ import annotations

import os
import platform

import torch

from lean_attention import _build, _core
from lean_attention._core import tools
from lean_attention._version import __version__

DTYPES = ("float32", "float16", "bfloat16")


def chosen_for(dtype: str) -> str:
    """The instruction set that decode uses, and from how many query rows per KV head on which other one."""
    text = chosen = tools.chosen_instruction_set(dtype)
    for rows in range(2, 65):
        if (better := tools.chosen_instruction_set(dtype, rows)) != chosen:
            text += f" ({better} from {rows} query rows per KV head on)"
            chosen = better
    return text


def describe() -> str:
    """One fact per line."""
    chosen = ", ".join(f"{chosen_for(dtype)} for {dtype}" for dtype in DTYPES)
    kernels = len(_core.cuda_kernels())
    forced = {name: os.environ.get(name) for name in ("LEAN_ATTENTION_CPU", "LEAN_ATTENTION_TUNING")}
    says = {name: f" ({name}={value})" if value else "" for name, value in forced.items()}
    tuning = _core.tuning()
    facts = {
        "lean_attention": __version__,
        "torch": f"{torch.__version__} (the core runs with any from 2.10 on)",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "core": str(_core.library),
        "backends": "cpu" + (f", cuda ({kernels} kernels)" if kernels else " (built without CUDA)"),
        "instruction sets": f"this machine runs {tools.instruction_sets().replace(' ', ', ')}",
        "in use": chosen + says["LEAN_ATTENTION_CPU"],
        "tuning": tuning.pop("name") + says["LEAN_ATTENTION_TUNING"],
        "tuned": ", ".join(f"{field} {value}" for field, value in tuning.items()),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "compiler": tools.compiler(),
        "build flags": " ".join(_build.COMPILE_FLAGS),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())
