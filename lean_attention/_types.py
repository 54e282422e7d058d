"""Errors about an argument's Python type, where PyTorch's dispatcher would show an op's schema."""

from __future__ import annotations

import numbers
import reprlib

import torch
from torch import Tensor

_WORDS = {
    "Tensor": "a Tensor",
    "List[Tensor]": "a list of Tensors",
    "int": "an int",
    "float": "a float",
    "ScalarType": "a torch.dtype",
}


def refuse_wrong_types(function: str, op: torch._ops.OpOverload, args: tuple, options: dict) -> None:
    """Raises a TypeError that names the first argument of `op` that has another type than in its schema.

    For calls that have failed: calls that work need no look at their types.
    """
    for i, argument in enumerate(op._schema.arguments):
        if i < len(args):
            refuse_wrong_type(function, argument.name, args[i], str(argument.real_type))
        elif argument.name in options:
            refuse_wrong_type(function, argument.name, options[argument.name], str(argument.real_type))


def refuse_wrong_type(function: str, name: str, value: object, kind: str) -> None:
    """Raises a TypeError unless `value` is of `kind`, as schemas write it: ``Optional[Tensor]``."""
    wanted = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional") else kind
    if (value is None and wanted != kind) or _is(wanted, value):
        return
    if wanted == "List[Tensor]" and isinstance(value, (list, tuple)):
        for i, element in enumerate(value):
            refuse_wrong_type(function, f"{name}[{i}]", element, "Tensor")
    words = _WORDS[wanted] + " of 64 bits" * (wanted == "int" and isinstance(value, numbers.Integral))
    or_none = " or None" if wanted != kind else ""
    raise TypeError(f"{function}: {name} is {described(value)}; it must be {words}{or_none}") from None


def described(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a Tensor of shape {list(value.shape)}"
    kind = type(value).__name__
    return f"{reprlib.repr(value)}, {'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _is(kind: str, value: object) -> bool:
    if kind == "Tensor":
        return isinstance(value, Tensor)
    if kind == "List[Tensor]":
        return isinstance(value, (list, tuple)) and all(isinstance(element, Tensor) for element in value)
    if kind == "ScalarType":
        return isinstance(value, torch.dtype)
    if isinstance(value, Tensor):
        return value.numel() == 1  # the dispatcher takes it for its number
    if kind == "int":
        in_range = isinstance(value, numbers.Integral) and -(2**63) <= value < 2**63
        return in_range or isinstance(value, torch.SymInt)
    if kind == "float":
        return isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat))
    return True  # it takes anything for a bool
