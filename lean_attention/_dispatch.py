"""Calls of ops, and PyTorch's layer for gradients, of which they need only the refusal."""

from __future__ import annotations

import torch

from lean_attention._core import NAMESPACE

# Names of this module are found sooner than those in torch.
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_is_inference_mode_enabled = torch.is_inference_mode_enabled


def needs_full_dispatch() -> bool:
    """False where no gradient can be asked for and an op may be called below PyTorch's layer for gradients.

    That layer is Python, makes a gradient raise, and takes longer than a short decode. Inference mode has
    none.
    """
    # Inference mode is asked for last: a graph that torch.compile traces would break there.
    return _is_grad_enabled() or _is_compiling() or _is_inference_mode_enabled()


def call(op, *tensors, **options):
    if needs_full_dispatch():
        return op(*tensors, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*tensors, **options)


def refuse_gradients(op_name: str) -> None:
    def backward(_ctx, *_grads):
        raise RuntimeError(
            f"lean_attention.{op_name} has no gradient: it is for inference. "
            "Call it under torch.no_grad() or torch.inference_mode(), or train with another attention."
        )

    torch.library.register_autograd(f"{NAMESPACE}::{op_name}", backward)
