"""Loads a kernel's folder as the Hugging Face hub's users would, without the hub: `make hub-check`.

    python -m release.hub_check build/hub

By `kernels.get_local_kernel`, and by name (LOCAL_KERNELS) as the attention of a transformers model.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

NAME = "lean-attention/lean-attention"


def check_local(folder: Path) -> str:
    """Results of the kernel's functions; returns the name of its ops."""
    from kernels import get_local_kernel

    begin = time.perf_counter()
    kernel = get_local_kernel(folder, backend="cpu")
    print(f"get_local_kernel: {kernel.__name__} in {1000 * (time.perf_counter() - begin):.0f} ms")
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 90, 2, 64), torch.randn(2, 90, 2, 64)
    lens = torch.tensor([90, 17], dtype=torch.int32)
    out, lse = kernel.decode(q, k, v, lens)
    want_out, want_lse = kernel.reference.decode(q, k, v, lens)
    assert torch.allclose(out.double(), want_out, atol=1e-5) and torch.allclose(
        lse.double(), want_lse, atol=1e-5
    )
    also = kernel.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, causal=True)
    assert torch.allclose(also.double(), want_out, atol=1e-5)
    name = kernel.ops.NAMESPACE
    assert kernel.__name__ == name and not hasattr(torch.ops.lean_attn, "decode")
    torch.library.opcheck(getattr(torch.ops, name).decode.default, (q, k, v, lens))
    print(f"decode, flash_attn_with_kvcache, opcheck: as the reference, ops in torch.ops.{name}")
    return name


def check_in_transformers(name: str) -> None:
    """attn_implementation="org/name", with transformers as it is."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, eos_token_id=None, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    model.set_attn_implementation(NAME, allow_all_kernels=True)
    calls = 0
    registered = ALL_ATTENTION_FUNCTIONS[NAME]

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        return registered(*arguments, **keywords)

    assert registered.__module__ == name, registered
    ALL_ATTENTION_FUNCTIONS.register(NAME, counted)
    assert torch.equal(model.generate(ids, **options), want)
    assert calls == 2 * 12, calls
    print(f"transformers {transformers.__version__}: attn_implementation={NAME!r} generates sdpa's tokens")


def check_beside_the_package(name: str) -> None:
    """Where it is installed."""
    try:
        import lean_attention
    except ImportError:
        print("beside the package: left out, it is not installed here")
        return
    q, k = torch.randn(1, 1, 2, 64), torch.randn(1, 9, 2, 64)
    ours, theirs = lean_attention.decode(q, k, k)[0], getattr(torch.ops, name).decode(q, k, k)[0]
    assert torch.equal(ours, theirs)
    print("beside the package: both run in one process")


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    os.environ["LOCAL_KERNELS"] = f"{NAME}={folder}"
    os.environ["HF_HUB_OFFLINE"] = "1"
    name = check_local(folder)
    check_in_transformers(name)
    check_beside_the_package(name)
