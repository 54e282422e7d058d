"""vLLM's attention backend for CPUs, with this package's ops in the place of its kernels.

The cache is vLLM's: ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``, in each block and head first
all keys, then all values. Keys lie as rows, which vLLM's own kernels do not want, so a layer is served by
either package for all its life.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

import lean_attention
from lean_attention.integrations.vllm.prefixes import Finder, token_order

IMPLEMENTATION_PARAMETERS = (
    "num_heads",
    "head_size",
    "scale",
    "num_kv_heads",
    "alibi_slopes",
    "sliding_window",
    "kv_cache_dtype",
    "logits_soft_cap",
    "attn_type",
    "kv_sharing_target_layer_name",
    "sinks",
)
FORWARD_PARAMETERS = (
    "layer",
    "query",
    "key",
    "value",
    "kv_cache",
    "attn_metadata",
    "output",
    "output_scale",
    "output_block_scale",
)
UPDATE_PARAMETERS = ("layer", "key", "value", "kv_cache", "slot_mapping")
BUILDER_PARAMETERS = ("kv_cache_spec", "layer_names", "vllm_config", "device")
BUILD_PARAMETERS = ("common_prefix_len", "common_attn_metadata", "fast_build")
METADATA_PARAMETERS = (
    "num_actual_tokens",
    "max_query_len",
    "query_start_loc",
    "max_seq_len",
    "seq_lens",
    "block_table",
    "slot_mapping",
    "scheduler_metadata",
    "causal",
    "dynamic_causal",
    "use_sdpa_prefill",
    "num_decode_tokens",
    "sdpa_attn_masks",
    "sdpa_start_loc",
    "encoder_cache",
)

_FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

_logger = init_logger("vllm.lean_attention")


class Batch(NamedTuple):
    """What a step's requests are to ``decode``: its arguments of the same names."""

    seq_lens: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor
    shared: Tensor | None = None


@dataclass
class LeanAttentionMetadata(CPUAttentionMetadata):
    """A step, and for the layers that can share what its requests share.

    ``sharing`` may have the requests in another order, that of the query tokens ``order``; ``None``: they are
    in vLLM's.
    """

    sharing: Batch | None = None
    order: Tensor | None = None


class LeanAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention.

    ``reason`` says why the layer is left to vLLM's own implementation; it is ``None`` where it is not.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.cache_dtype = _FP8.get(self.kv_cache_dtype)
        self.reason = self._why_not(config)
        self._asked_for = 0  # huge pages, for the memory at this address
        # decode refuses `shared` with windows and slopes.
        self.can_share = self.sliding_window <= 0 and self.alibi_slopes is None
        if self.reason is None:
            _logger.info_once("lean_attention %s serves attention", lean_attention.__version__)
        elif self.attn_type == AttentionType.DECODER:
            _logger.warning_once("lean_attention: vLLM's own attention serves layers with %s", self.reason)
        else:
            _logger.info_once("lean_attention: vLLM's own attention serves layers with %s", self.reason)

    def _why_not(self, config: VllmConfig) -> str | None:
        if self.attn_type != AttentionType.DECODER:
            return f"{AttentionType(self.attn_type).value} attention"
        if self.head_size % 8 or self.head_size > 512:
            return f"a head_dim of {self.head_size}"
        dtype = config.model_config.dtype
        cached = self.cache_dtype or kv_cache_dtype_str_to_dtype(self.kv_cache_dtype, config.model_config)
        if cached not in (dtype, *_FP8.values()):
            return f"a {self.kv_cache_dtype} cache and {dtype}"
        if config.kv_transfer_config is not None:
            return "a cache that a KV connector moves, which has to be in vLLM's own format"
        if config.attention_config.use_non_causal or config.model_config.is_diffusion:
            return "attention that is not causal"
        return None

    def leave(self, reason: str) -> None:
        """Leaves the layer to vLLM's own implementation, before its cache is written."""
        self.reason = reason
        _logger.warning_once("lean_attention: vLLM's own attention serves layers with %s", reason)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's packed query tokens, which are in the cache already.

        Args:
            layer: has the scales of a quantised cache, ``_k_scale`` and ``_v_scale``.
            query: ``[num_tokens, num_heads, head_dim]``, float32, float16 or bfloat16.
            key, value: ``[num_tokens, num_kv_heads, head_dim]``; not read.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``, in query's dtype, or uint8
                that holds fp8 numbers.
            attn_metadata: of the step; ``None`` while vLLM measures memory: nothing is computed.
            output: ``[num_tokens, num_heads, head_dim]``, written.

        Returns:
            ``output``.

        Raises:
            NotImplementedError: the output is to be quantised.
        """
        if self.reason is None:
            self._ask_for_huge_pages(kv_cache)
        quantised_output = output_scale is not None or output_block_scale is not None
        if self.reason is not None or attn_metadata is None or quantised_output:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        tokens = attn_metadata.num_actual_tokens
        k_pages, v_pages = self._pages(kv_cache)
        quantised = self.cache_dtype is not None
        # vLLM's own builder makes no LeanAttentionMetadata.
        batch = getattr(attn_metadata, "sharing", None) if self.can_share else None
        order = None if batch is None else attn_metadata.order
        if batch is None:
            batch = Batch(attn_metadata.seq_lens, attn_metadata.block_table, attn_metadata.query_start_loc)
        query, out = query[:tokens], output[:tokens]
        if order is not None:
            query = query.index_select(0, order)
        found, _ = lean_attention.decode(
            query,
            k_pages,
            v_pages,
            **batch._asdict(),
            alibi_slopes=self.alibi_slopes,
            # Weights are loaded after this object was made, and may be loaded again.
            sinks=None if self.sinks is None else self.sinks.float(),
            k_scale=layer._k_scale if quantised else None,
            v_scale=layer._v_scale if quantised else None,
            scale=self.scale,
            # vLLM counts a token's own position in its window.
            window_left=self.sliding_window - 1 if self.sliding_window > 0 else -1,
            softcap=self.logits_soft_cap,
            out=out if order is None else None,
        )
        if order is not None:
            out.index_copy_(0, order, found)
        return output

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes a step's keys and values into the cache.

        Args:
            layer: as in :meth:`forward`.
            key, value: ``[num_tokens, num_kv_heads, head_dim]``.
            kv_cache: as in :meth:`forward`; changed in place.
            slot_mapping: ``[num_tokens]`` int64: token ``t`` goes to slot ``slot_mapping[t] % block_size`` of
                block ``slot_mapping[t] // block_size``; where it is -1, nowhere.
        """
        if self.reason is not None:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        tokens = len(slot_mapping)
        key, value = key[:tokens], value[:tokens]
        if self.cache_dtype is not None:
            # append_kv would choose a scale for each row; vLLM has one for each layer.
            key = self._quantised(key, layer._k_scale)
            value = self._quantised(value, layer._v_scale)
        lean_attention.append_kv(*self._pages(kv_cache), key, value, slot_mapping=slot_mapping)

    def _ask_for_huge_pages(self, kv_cache: Tensor) -> None:
        """Once for a cache, which vLLM has filled with zeros."""
        memory = kv_cache.data_ptr()
        if memory != self._asked_for:
            self._asked_for = memory
            if lean_attention.use_huge_pages(kv_cache):
                _logger.info_once("lean_attention: the KV cache is in memory pages of 2 MB")

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the keys and the values, ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
        blocks, heads, block_size, _ = kv_cache.shape
        rows = kv_cache.view(blocks, heads, 2 * block_size, self.head_size)
        if self.cache_dtype is not None:
            rows = rows.view(self.cache_dtype)
        keys, values = rows.transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def _quantised(self, rows: Tensor, scale: Tensor) -> Tensor:
        largest = torch.finfo(self.cache_dtype).max
        return (rows.float() / scale).clamp(-largest, largest).to(self.cache_dtype)


class LeanAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Metadata of a step for the layers that share a block table."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        impls = [layer.impl for layer in layers if isinstance(layer.impl, LeanAttentionImpl)]
        if getattr(kv_cache_spec, "non_causal", False):
            for impl in impls:
                if impl.reason is None:
                    impl.leave("attention that is not causal")
        self._all_served = len(impls) == len(layer_names) and all(impl.reason is None for impl in impls)
        self._finder = Finder(kv_cache_spec.block_size) if any(impl.can_share for impl in impls) else None
        if self._all_served:
            # vLLM's own builder refuses head_dims that only its kernels have trouble with.
            AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        else:
            # The backend admits any block size, before anyone knows which layers it will not serve.
            if not CPUAttentionBackend.supports_block_size(kv_cache_spec.block_size):
                raise ValueError(
                    f"lean_attention: a block size of {kv_cache_spec.block_size} does not go with layers "
                    "that are left to vLLM's own attention, which takes multiples of 32; choose another "
                    "--block-size, or none"
                )
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """What vLLM's own builder makes; without the schedule of its kernels where no layer needs it."""
        common = common_attn_metadata
        if not self._all_served:
            return super().build(common_prefix_len, common, fast_build)
        if common.causal is not True:
            raise NotImplementedError(
                "lean_attention: this step's attention is not causal, which vLLM did not say at the start; "
                "start vLLM with LEAN_ATTENTION_VLLM=0, and please report the model"
            )
        batch = Batch(
            common.seq_lens.to(torch.int32),
            common.block_table_tensor.to(torch.int32),
            common.query_start_loc.to(torch.int32),
        )
        tokens = common.num_actual_tokens
        sharing, order = (
            self._sharing(self._finder, batch, tokens) if self._finder is not None else (None, None)
        )
        return LeanAttentionMetadata(
            num_actual_tokens=tokens,
            max_query_len=common.max_query_len,
            query_start_loc=batch.cu_seqlens_q,
            max_seq_len=common.max_seq_len,
            seq_lens=batch.seq_lens,
            block_table=batch.block_table,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            sharing=sharing,
            order=order,
        )

    @staticmethod
    def _sharing(finder: Finder, batch: Batch, tokens: int) -> tuple[Batch | None, Tensor | None]:
        """The batch with what it shares, and the order of its query tokens."""
        starts = batch.cu_seqlens_q.numpy()
        new = np.diff(starts)
        found = finder.find(batch.block_table.numpy(), batch.seq_lens.numpy(), new)
        if found is None:
            return None, None
        rows = torch.from_numpy(found.rows)
        if found.order is None:
            return batch._replace(shared=rows), None
        requests = torch.from_numpy(found.order)
        order = token_order(found.order, starts, tokens)
        ends = np.concatenate([starts[:1], new[found.order].cumsum(dtype=starts.dtype)])
        sharing = Batch(batch.seq_lens[requests], batch.block_table[requests], torch.from_numpy(ends), rows)
        return sharing, torch.from_numpy(order)


class LeanAttentionBackend(CPUAttentionBackend):
    """In the place of vLLM's ``CPU_ATTN``, whose name it keeps: vLLM looks layers' backends up by it."""

    supported_kv_cache_dtypes: ClassVar = [
        "auto",
        "float16",
        "bfloat16",
        *CPUAttentionBackend.supported_kv_cache_dtypes[1:],
    ]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[LeanAttentionImpl]:
        return LeanAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LeanAttentionMetadataBuilder]:
        return LeanAttentionMetadataBuilder
