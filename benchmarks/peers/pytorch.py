"""What PyTorch has: SDPA and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Inputs, Unavailable


def by_sequence(
    case: Case, inputs: Inputs, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Uniform batches in one call; ragged ones sequence by sequence, so that no padding is read."""
    q = inputs.q.transpose(1, 2)
    k, v = inputs.k_cache.transpose(1, 2), inputs.v_cache.transpose(1, 2)
    if len(set(case.lens)) == 1:
        return lambda: attention(q, k, v).transpose(1, 2)
    rows = [
        (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        for b, length in enumerate(case.lens)
    ]
    return lambda: torch.cat([attention(*row) for row in rows]).transpose(1, 2)


class Sdpa:
    """torch.nn.functional.scaled_dot_product_attention."""

    name = "sdpa"

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        grouped = case.heads != case.kv_heads
        return by_sequence(
            case, inputs, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        )


class SdpaFolded:
    """The same with groups folded by hand: the query heads of a KV head passed as its query rows."""

    name = "sdpa-folded"

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        group = case.heads // case.kv_heads

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = q.reshape(q.shape[0], case.kv_heads, group, case.head_dim)
            return F.scaled_dot_product_attention(rows, k, v).reshape(q.shape)

        return by_sequence(case, inputs, attention)


class FlexAttention:
    """torch.nn.attention.flex_attention, compiled for the case; compiling is not timed.

    Ragged batches in one call, with a block mask that leaves out what lies beyond a sequence's end.
    """

    name = "flex"

    def __init__(self) -> None:
        self._case: Case | None = None
        self._compiled: Callable[..., Tensor] | None = None

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if case != self._case:
            torch._dynamo.reset()
            self._case, self._compiled = case, torch.compile(flex_attention, dynamic=False)
        compiled, mask = self._compiled, None
        if len(set(case.lens)) > 1:
            lens = inputs.seq_lens
            mask = create_block_mask(
                lambda b, _head, _query, token: token < lens[b],
                len(case.lens),
                None,
                1,
                max(case.lens),
                device="cpu",
            )
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k_cache, inputs.v_cache))
        grouped = case.heads != case.kv_heads

        def call() -> Tensor:
            return compiled(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

        try:
            call()
        except Exception as error:  # whatever the compiler raises, in one line
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Unavailable(f"does not compile: {text[:120]}") from error
        return call
