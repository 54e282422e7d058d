"""The contenders: this package, its baseline schedules, and what users have today."""

from benchmarks.peers.ggml import Ggml
from benchmarks.peers.onnx import OnnxRuntime
from benchmarks.peers.ours import FixedSplit, LeanAttention
from benchmarks.peers.pytorch import FlexAttention, Sdpa, SdpaFolded
from benchmarks.peers.vllm import Vllm

_ENGINES = [
    LeanAttention(),
    Sdpa(),
    SdpaFolded(),
    FlexAttention(),
    OnnxRuntime(),
    Vllm(),
    Ggml(),
]
# They read a case's K and V from caches of 8 bits.
_QUANTISED = [LeanAttention("int8"), LeanAttention("fp8"), Vllm("fp8"), Ggml("q8_0")]
_BASELINES = [FixedSplit(splits) for splits in (1, 2, 4, 8)]

DEFAULT = [*_ENGINES, *_BASELINES]
ENGINES = [*_ENGINES, *_QUANTISED]
ALL = [*_ENGINES, *_BASELINES, *_QUANTISED]

__all__ = [
    "ALL",
    "DEFAULT",
    "ENGINES",
    "FixedSplit",
    "FlexAttention",
    "Ggml",
    "LeanAttention",
    "OnnxRuntime",
    "Sdpa",
    "SdpaFolded",
    "Vllm",
]
