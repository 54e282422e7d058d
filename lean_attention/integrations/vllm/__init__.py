"""vLLM on CPUs: attention through this package.

vLLM finds :func:`register` by its entry point ``lean_attention`` in the group ``vllm.general_plugins``, and
calls it in every process: where both packages are installed, nothing else is to be done.
``LEAN_ATTENTION_VLLM=0`` or a ``VLLM_PLUGINS`` without ``lean_attention`` leaves vLLM as it is.

Whatever keeps this package from serving is said in vLLM's log, and vLLM's own backend serves.
"""

from __future__ import annotations

import inspect
import os

TESTED = ("0.32",)
VARIABLE = "LEAN_ATTENTION_VLLM"
BACKEND = "lean_attention.integrations.vllm.backend.LeanAttentionBackend"

__all__ = ["BACKEND", "TESTED", "VARIABLE", "register"]


def register() -> None:
    """Puts this package's attention in the place of vLLM's ``CPU_ATTN``.

    It never raises: a plugin's exception would end vLLM's engine.
    """
    from vllm.logger import init_logger

    # vLLM configures the loggers below its own name only.
    logger = init_logger("vllm.lean_attention")
    try:
        asked = os.environ.get(VARIABLE, "1")
        if asked == "0":
            logger.info_once("lean_attention: switched off by %s=0", VARIABLE)
            return
        if asked not in ("", "1"):
            logger.warning_once(
                "lean_attention: %s is %r; it must be 0 or 1. vLLM's own attention serves", VARIABLE, asked
            )
            return
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            logger.info_once(
                "lean_attention: this vLLM is built for %s and is left alone; this package serves vLLM's "
                "CPU build",
                current_platform.device_name,
            )
            return
        changes = _changes_of_interface()
        if changes:
            logger.warning_once(
                "lean_attention: vLLM %s is not served, because its interface has changed (%s). vLLM's own "
                "attention serves. Please report this line",
                _version(),
                "; ".join(changes),
            )
            return
        if not _version().startswith(tuple(f"{version}." for version in TESTED)):
            logger.warning_once(
                "lean_attention: tested with vLLM %s, not with %s. Where answers look wrong, compare with "
                "%s=0, and please report this line",
                " and ".join(TESTED),
                _version(),
                VARIABLE,
            )
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    except Exception as error:
        logger.warning_once(
            "lean_attention: vLLM is not served (%s: %s). vLLM's own attention serves. Please report this "
            "line and the output of `python -m lean_attention info`",
            type(error).__name__,
            str(error),
        )


def _version() -> str:
    import vllm

    return vllm.__version__


def _changes_of_interface() -> list[str]:
    """In what vLLM differs from what the backend was written for.

    An option that vLLM has added could not be honoured, so it counts as a change too.
    """
    from vllm.v1.attention.backends import cpu_attn

    from lean_attention.integrations.vllm import backend

    changes = []
    for owner, method, expected in (
        ("CPUAttentionBackendImpl", "__init__", backend.IMPLEMENTATION_PARAMETERS),
        ("CPUAttentionBackendImpl", "forward", backend.FORWARD_PARAMETERS),
        ("CPUAttentionBackendImpl", "do_kv_cache_update", backend.UPDATE_PARAMETERS),
        ("CPUAttentionMetadataBuilder", "__init__", backend.BUILDER_PARAMETERS),
        ("CPUAttentionMetadataBuilder", "build", backend.BUILD_PARAMETERS),
        ("CPUAttentionMetadata", "__init__", backend.METADATA_PARAMETERS),
    ):
        found = tuple(inspect.signature(getattr(getattr(cpu_attn, owner), method)).parameters)[1:]
        if found != expected:
            differing = sorted(set(found) ^ set(expected)) or ["their order"]
            changes.append(f"{owner}.{method}: {', '.join(differing)}")
    return changes
