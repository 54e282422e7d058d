// The ops: schemas and registration. This file and the op_*.cpp are the only ones that see torch tensors.
//
// Built on PyTorch's stable ABI, so that one binary serves every torch from 2.10 on.
#include "ops.h"

#include <torch/csrc/stable/library.h>

// The tests' emulated device takes CPU tensors under a name of its own.
#if defined(LEAN_EMULATED)
#define LEAN_LIBRARY lean_attn_emulated
#else
#define LEAN_LIBRARY lean_attn
#endif

#define LEAN_DECODE_OPTIONS                                                                           \
  "Tensor? seq_lens=None, Tensor? block_table=None, Tensor? cache_batch_idx=None, "                   \
  "Tensor? cache_leftpad=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, " \
  "Tensor? v_scale=None, Tensor? cu_seqlens_q=None, Tensor? tree_mask=None, *, float? scale=None, "   \
  "bool causal=True, int window_left=-1, int window_right=-1, float softcap=0.0, int num_ctas=0"

STABLE_TORCH_LIBRARY(LEAN_LIBRARY, m) {
  m.def("decode(Tensor q, Tensor k_cache, Tensor v_cache, " LEAN_DECODE_OPTIONS
        ") -> (Tensor out, Tensor lse)");
  m.def(
      "decode_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!) "
      "lse, " LEAN_DECODE_OPTIONS ") -> ()");
  m.def(
      "decode_fixed_split(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? seq_lens=None, *, int splits=1) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "read_only(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? seq_lens=None) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor seq_lens, "
      "Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? cu_seqlens=None, Tensor(c!)? q=None, "
      "Tensor? rotary_cos=None, Tensor? rotary_sin=None, *, bool rotary_interleaved=False, "
      "Tensor(d!)? k_scale=None, Tensor(e!)? v_scale=None) -> ()");
  m.def(
      "merge_states(Tensor[] outs, Tensor[] lses, *, float base=2.718281828459045) -> (Tensor out, Tensor "
      "lse)");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_LIBRARY, CPU, m) {
  m.impl("decode", TORCH_BOX(&lean::decode));
  m.impl("decode_out", TORCH_BOX(&lean::decode_out));
  m.impl("decode_fixed_split", TORCH_BOX(&lean::decode_fixed_split));
  m.impl("read_only", TORCH_BOX(&lean::read_only));
  m.impl("append_kv", TORCH_BOX(&lean::append_kv));
  m.impl("merge_states", TORCH_BOX(&lean::merge_states));
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_LIBRARY, CUDA, m) {
  m.impl("decode", TORCH_BOX(&lean::decode));
  m.impl("decode_out", TORCH_BOX(&lean::decode_out));
  m.impl("append_kv", TORCH_BOX(&lean::append_kv));
  m.impl("merge_states", TORCH_BOX(&lean::merge_states));
}
