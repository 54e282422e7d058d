"""What runs the ops: a CPU with each instruction set that this machine has, the emulated device, a GPU.

A test that takes `backend` runs on all of them, with :data:`devices` on the CPU's best only, and with
:func:`listed` on those that its cases are for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import lean_attention
from lean_attention._core import tools
from tests import emulation
from tests.cases import BF16, DTYPES, F16, Case, in_dtypes

INSTRUCTION_SETS = tools.instruction_sets().split()
CPUS = [f"cpu-{name}" for name in INSTRUCTION_SETS]
BACKENDS = [*CPUS, "emulated", "cuda"]
DEVICES = ["cpu", "emulated", "cuda"]


class Cpu:
    """And what the others have in common with it."""

    name = "cpu"
    dtypes = DTYPES
    raises_at_once = True  # at bad numbers inside tensors; a GPU records them, for check_errors

    decode = staticmethod(lean_attention.decode)
    append_kv = staticmethod(lean_attention.append_kv)
    merge_states = staticmethod(lean_attention.merge_states)


class Emulated:
    name = "emulated"
    dtypes = (F16, BF16)
    raises_at_once = False

    def __init__(self) -> None:
        self.device = emulation.load()
        seed = random.randrange(2**32)
        print(f"emulated device: seed={seed}")
        self.device.configure(seed=seed, resident_ctas=1 + seed % 7, sms=1 + seed % 5)
        self.take_error = self.device.take_error
        ops = torch.ops.lean_attn_emulated
        self.append_kv, self.merge_states = ops.append_kv, ops.merge_states

    @staticmethod
    def decode(**arguments) -> tuple[Tensor, Tensor]:
        ops = torch.ops.lean_attn_emulated
        if "out" not in arguments:
            return ops.decode(**arguments)
        ops.decode_out(**arguments)
        return arguments["out"], arguments["lse"]


class Cuda:
    """Takes and gives tensors of the CPU."""

    name = "cuda"
    dtypes = (F16, BF16)
    raises_at_once = False

    @staticmethod
    def decode(**arguments) -> tuple[Tensor, Tensor]:
        out, lse = lean_attention.decode(**to_gpu(arguments))
        return out.cpu(), lse.cpu()

    @staticmethod
    def append_kv(**arguments) -> None:
        moved = to_gpu(arguments)
        lean_attention.append_kv(**moved)
        for name in ("k_cache", "v_cache", "q", "k_scale", "v_scale"):
            if arguments.get(name) is not None:
                arguments[name].copy_(moved[name])

    @staticmethod
    def merge_states(outs: list[Tensor], lses: list[Tensor], **options) -> tuple[Tensor, Tensor]:
        outs, lses = ([tensor.cuda() for tensor in tensors] for tensors in (outs, lses))
        out, lse = lean_attention.merge_states(outs, lses, **options)
        return out.cpu(), lse.cpu()

    @staticmethod
    def take_error() -> str:
        """What check_errors raises with."""
        try:
            lean_attention.check_errors()
        except ValueError as error:
            return str(error).removesuffix(" [cuda:0]")
        return ""


Backend = Cpu | Emulated | Cuda


def to_gpu(arguments: dict) -> dict:
    """With the strides that they have, and one memory where they share it: Tensor.cuda makes views dense."""
    memories: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in memories:
            memories[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).cuda()
        memory = memories[storage.data_ptr()]
        made = torch.empty(0, dtype=tensor.dtype, device=memory.device)
        return made.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    return {name: moved(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    return {"emulated": Emulated.dtypes, "cuda": Cuda.dtypes}.get(backend, Cpu.dtypes)


def marked(backend: str, *values: object, id: str = "") -> object:
    marks = pytest.mark.gpu if backend == "cuda" else ()
    return pytest.param(*values, backend, marks=marks, id=id or backend)


def on_each(cases: Iterable[Case], backends: list[str]) -> list[tuple[str, Case]]:
    """Every case on every backend, in a dtype that it has."""
    pairs = ((backend, in_dtypes(case, dtypes_of(backend))) for backend in backends for case in cases)
    return list(dict.fromkeys(pairs))


def listed(pairs: Iterable[tuple[str, Case]]) -> pytest.MarkDecorator:
    """`case` and `backend` of a test."""
    parameters = [marked(backend, case, id=f"{backend}-{case}") for backend, case in pairs]
    return pytest.mark.parametrize(("case", "backend"), parameters, indirect=["backend"])


def only(*backends: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", [marked(name) for name in backends], indirect=True)


# Where instruction sets make no difference.
devices = only(*DEVICES)
