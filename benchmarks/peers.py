"""The contenders: this package, its baseline schedules, and what users have today."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lean_attention
from benchmarks.harness import OURS, Case, Inputs, Unavailable


class LeanAttention:
    name = OURS

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        return lambda: lean_attention.decode(inputs.q, inputs.k_cache, inputs.v_cache, inputs.seq_lens)[0]


class FixedSplit:
    """FlashAttention-2's split by batch and head (1) or FlashDecoding's (more), on our tile kernels."""

    def __init__(self, splits: int) -> None:
        self.splits = splits
        self.name = "head-split" if splits == 1 else f"split-{splits}"

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        op = torch.ops.lean_attn.decode_fixed_split.default
        return lambda: op(inputs.q, inputs.k_cache, inputs.v_cache, inputs.seq_lens, splits=self.splits)[0]


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


class OnnxRuntime:
    """ONNX Runtime's GroupQueryAttention, past and present in one cache so that nothing is copied."""

    name = "onnxruntime"

    def __init__(self) -> None:
        self._case: Case | None = None
        self._session = None

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise Unavailable("not installed (see third_party/README.md)") from error
        if case.dtype == torch.bfloat16:
            raise Unavailable("GroupQueryAttention has no bf16 kernel on CPUs")
        if case.layout != "heads_first":
            raise Unavailable("reads [batch, heads, tokens, dim] caches only")
        if case != self._case:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            # Its idle threads would spin through the other contenders' turns.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            model = self._model(case)
            self._case, self._session = case, onnxruntime.InferenceSession(model, options)
        return self._bind(case, inputs)

    @staticmethod
    def _model(case: Case) -> bytes:
        from onnx import TensorProto, helper

        dtype = TensorProto.FLOAT if case.dtype == torch.float32 else TensorProto.FLOAT16
        batch, longest = len(case.lens), max(case.lens)
        kv_width = case.kv_heads * case.head_dim
        cache = [batch, case.kv_heads, longest, case.head_dim]
        inputs = {
            "query": (dtype, [batch, 1, case.heads * case.head_dim]),
            "key": (dtype, [batch, 1, kv_width]),
            "value": (dtype, [batch, 1, kv_width]),
            "past_key": (dtype, cache),
            "past_value": (dtype, cache),
            "seqlens_k": (TensorProto.INT32, [batch]),
            "total_sequence_length": (TensorProto.INT32, []),
        }
        outputs = {
            "output": (dtype, [batch, 1, case.heads * case.head_dim]),
            "present_key": (dtype, cache),
            "present_value": (dtype, cache),
        }
        node = helper.make_node(
            "GroupQueryAttention",
            list(inputs),
            list(outputs),
            domain="com.microsoft",
            num_heads=case.heads,
            kv_num_heads=case.kv_heads,
        )
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            "decode",
            [info(name, *kind) for name, kind in inputs.items()],
            [info(name, *kind) for name, kind in outputs.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()

    def _bind(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        import numpy

        batch = len(case.lens)
        # The op appends a token before it attends: give it the one that is there already.
        last = [int(n) - 1 for n in case.lens]
        rows = torch.arange(batch)
        out = torch.empty(batch, 1, case.heads * case.head_dim, dtype=case.dtype)
        tensors = {
            "query": inputs.q.reshape(batch, 1, -1).contiguous(),
            "key": inputs.k_cache[rows, last].reshape(batch, 1, -1).contiguous(),
            "value": inputs.v_cache[rows, last].reshape(batch, 1, -1).contiguous(),
            "past_key": inputs.k_cache.transpose(1, 2),
            "past_value": inputs.v_cache.transpose(1, 2),
            "seqlens_k": torch.tensor(last, dtype=torch.int32),
            "total_sequence_length": torch.tensor(max(case.lens), dtype=torch.int32),
        }
        results = {
            "output": out,
            "present_key": tensors["past_key"],
            "present_value": tensors["past_value"],
        }
        types = {torch.float32: numpy.float32, torch.float16: numpy.float16, torch.int32: numpy.int32}
        binding = self._session.io_binding()
        for bind, named in ((binding.bind_input, tensors), (binding.bind_output, results)):
            for name, tensor in named.items():
                bind(name, "cpu", 0, types[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        session = self._session

        def call() -> Tensor:
            session.run_with_iobinding(binding)
            return out.view(batch, 1, case.heads, case.head_dim)

        call.keeps_alive = tensors
        return call


ALL = [
    LeanAttention(),
    Sdpa(),
    SdpaFolded(),
    FlexAttention(),
    OnnxRuntime(),
    FixedSplit(1),
    FixedSplit(2),
    FixedSplit(4),
    FixedSplit(8),
]
