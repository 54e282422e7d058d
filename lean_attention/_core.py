"""The compiled core: importing this module loads it, and with it registers the ops."""

# torch first: the core links against its libraries.
import torch  # noqa: F401

try:
    from lean_attention import _C as core
except ModuleNotFoundError as error:
    # Another missing module, or a core that does not load, is an error of its own.
    if error.name != "lean_attention._C" and "_C" not in str(error):
        raise
    from lean_attention._build import build_in_place

    core = build_in_place()

__all__ = ["core"]
