"""ONNX Runtime's attention for decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import NOT_INSTALLED, Case, Inputs, Unavailable


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
            raise Unavailable(NOT_INSTALLED) from error
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
