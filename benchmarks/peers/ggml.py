"""ggml's flash_attn_ext, which llama.cpp decodes with, called in the libraries of an npm package."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import NOT_INSTALLED, Case, Inputs, Unavailable

# Where `make bench` installs it; the variable names another folder that has libggml*.so.
INSTALLED = Path("build/ggml/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64")
FOLDER = "LEAN_ATTENTION_GGML"

# ggml.h's numbers of its types, of full precision and of the CPU among devices.
TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
TYPE_OF = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
F32_PRECISION = 10
CPU = 0
GRAPH_BYTES = 1 << 20


class InitParams(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class ThreadpoolParams(ctypes.Structure):
    """ggml_threadpool_params"""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


FOUR_SIZES = (c_int64,) * 4
SIGNATURES = {
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, *(c_int64,) * 3, c_void_p),
    "ggml_new_tensor_1d": (c_void_p, c_void_p, c_int, c_int64),
    "ggml_new_tensor_4d": (c_void_p, c_void_p, c_int, *FOUR_SIZES),
    "ggml_view_4d": (c_void_p, c_void_p, c_void_p, *FOUR_SIZES, *(c_size_t,) * 4),
    "ggml_flash_attn_ext": (c_void_p, *(c_void_p,) * 5, *(c_float,) * 3),
    "ggml_flash_attn_ext_set_prec": (None, c_void_p, c_int),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_threadpool_params_init": (None, POINTER(ThreadpoolParams), c_int),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, ctypes.c_char_p),
    "ggml_log_set": (None, c_void_p, c_void_p),
}
LOG = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)
say_nothing = LOG(lambda *_: None)


class Library:
    """The functions of libggml-base.so, and a backend: the CPU's best of the libraries beside it."""

    def __init__(self, folder: Path) -> None:
        try:
            (loader,) = (path for path in folder.glob("libggml.*") if ".so" in path.name)
            base = ctypes.CDLL(str(folder / "libggml-base.so"))
            backends = ctypes.CDLL(str(loader))
        except (OSError, ValueError) as error:
            raise Unavailable(NOT_INSTALLED) from error
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(base, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(say_nothing, None)
        backends.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        backends.ggml_backend_load_all_from_path(str(folder).encode())
        backends.ggml_backend_init_by_type.restype = c_void_p
        backends.ggml_backend_init_by_type.argtypes = [c_int, ctypes.c_char_p]
        self.backend = backends.ggml_backend_init_by_type(CPU, None)
        if not self.backend:
            raise Unavailable(f"none of the libraries in {folder} runs on this CPU")
        self._threads = 0

    def of_the_backend(self, name: str, result: object, *arguments: object) -> Callable:
        registry = self.backend_dev_backend_reg(self.backend_get_device(self.backend))
        address = self.backend_reg_get_proc_address(registry, name.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def use_threads(self, count: int) -> None:
        """Computes with so many from now on. They sleep between calls: others have their turns."""
        if count == self._threads:
            return
        params = ThreadpoolParams()
        self.threadpool_params_init(params, count)
        params.poll = 0
        pool = self.of_the_backend("ggml_threadpool_new", c_void_p, POINTER(ThreadpoolParams))(params)
        self.of_the_backend("ggml_backend_cpu_set_threadpool", None, c_void_p, c_void_p)(self.backend, pool)
        self.of_the_backend("ggml_backend_set_n_threads", None, c_void_p, c_int)(self.backend, count)
        self._threads = count


def folder() -> Path:
    return Path(os.environ.get(FOLDER, Path(__file__).parents[2] / INSTALLED)).resolve()


@cache
def library() -> Library:
    return Library(folder())


class Graph:
    """A graph that is computed over and over, on tensors of torch."""

    def __init__(self, ggml: Library) -> None:
        self.ggml = ggml
        self._context = ggml.init(InitParams(GRAPH_BYTES, None, True))
        self._graph = ggml.new_graph(self._context)
        self._buffers: list[int] = []
        self._keeps_alive: list[Tensor] = []

    def _put(self, ggml_tensor: int, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        buffer = self.ggml.backend_cpu_buffer_from_ptr(storage.data_ptr(), storage.nbytes())
        self.ggml.backend_tensor_alloc(buffer, ggml_tensor, tensor.data_ptr())
        self._buffers.append(buffer)
        self._keeps_alive.append(tensor)

    def dense(self, kind: str, tensor: Tensor, *sizes: int) -> int:
        """A contiguous tensor, by ggml's sizes: the fastest dimension comes first."""
        made = self.ggml.new_tensor_4d(self._context, TYPES[kind], *sizes)
        self._put(made, tensor)
        return made

    def rows(self, kind: str, cache: Tensor, head_dim: int) -> int:
        """K or V of a cache [batch, tokens, kv_heads, a row's numbers], which may be in any layout."""
        storage = cache.untyped_storage()
        row_bytes = self.ggml.row_size(TYPES[kind], head_dim)
        whole = self.ggml.new_tensor_1d(self._context, TYPES[kind], storage.nbytes() // row_bytes * head_dim)
        self._put(whole, cache.as_strided((1,), (1,), 0))
        batch, tokens, kv_heads, _ = cache.shape
        strides = [stride * cache.element_size() for stride in cache.stride()]
        return self.ggml.view_4d(
            *(self._context, whole, head_dim, tokens, kv_heads, batch),
            *(strides[1], strides[2], strides[0], cache.storage_offset() * cache.element_size()),
        )

    def attend(self, q: int, k: int, v: int, scale: float, out: Tensor) -> None:
        result = self.ggml.flash_attn_ext(self._context, q, k, v, None, scale, 0.0, 0.0)
        self.ggml.flash_attn_ext_set_prec(result, F32_PRECISION)
        self._put(result, out)
        self.ggml.build_forward_expand(self._graph, result)

    def compute(self) -> None:
        status = self.ggml.backend_graph_compute(self.ggml.backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def __del__(self) -> None:
        for buffer in self._buffers:
            self.ggml.backend_buffer_free(buffer)
        self.ggml.free(self._context)


class Ggml:
    """q in fp32, as ggml wants it. A ragged batch is a graph of one attention for each sequence."""

    def __init__(self, cache_type: str = "") -> None:
        self.cache_type = cache_type
        self.name = f"ggml-{cache_type}" if cache_type else "ggml"

    @staticmethod
    def versions() -> dict[str, str]:
        """The npm package's, if it is one."""
        try:
            package = json.loads((folder().parents[1] / "package.json").read_text())
        except OSError:
            return {}
        return {package["name"]: package["version"]}

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        ggml = library()
        ggml.use_threads(torch.get_num_threads())
        kind, caches = TYPE_OF[case.dtype], (inputs.k_cache, inputs.v_cache)
        if self.cache_type:
            if case.head_dim % 32:
                raise Unavailable(f"{self.cache_type} has blocks of 32 numbers, head_dim is {case.head_dim}")
            kind = self.cache_type
            caches = tuple(quantised(ggml, kind, cache) for cache in caches)
        q, out = inputs.q.float(), torch.empty(inputs.q.shape)
        graph, batch = Graph(ggml), len(case.lens)
        parts = [slice(0, batch)] if len(set(case.lens)) == 1 else [slice(b, b + 1) for b in range(batch)]
        for part in parts:
            length = case.lens[part.start]
            sizes = case.head_dim, 1, case.heads, part.stop - part.start
            graph.attend(
                graph.dense("f32", q[part], *sizes),
                *(graph.rows(kind, cache[part, :length], case.head_dim) for cache in caches),
                case.head_dim**-0.5,
                out[part],
            )

        def call() -> Tensor:
            graph.compute()
            return out

        return call


def quantised(ggml: Library, kind: str, cache: Tensor) -> Tensor:
    """A cache's rows in blocks of ggml's, as bytes in the order of the cache's memory."""
    by_memory = cache if cache.is_contiguous() else cache.transpose(1, 2)
    numbers = by_memory.float().nan_to_num()  # memory beyond a sequence's end holds anything
    head_dim = cache.shape[-1]
    row_bytes = ggml.row_size(TYPES[kind], head_dim)
    blocks = torch.empty(*numbers.shape[:-1], row_bytes, dtype=torch.uint8)
    rows = numbers.numel() // head_dim
    ggml.quantize_chunk(TYPES[kind], numbers.data_ptr(), blocks.data_ptr(), 0, rows, head_dim, None)
    return blocks if by_memory is cache else blocks.transpose(1, 2)
