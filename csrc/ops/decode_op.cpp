// decode, and the same into given tensors.
#include "ops/decode_call.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/dispatch.h"

namespace lean {
namespace {

void run(const Argument& q, const DecodeParams& params) {
  // Packed query tokens that are no sequence's are written too.
  if (params.query_tokens == 0 || (params.batch == 0 && !params.cu_seqlens_q)) return;
  dispatch(q, [&](const Backend& backend, const Queue& queue) { backend.decode(params, queue); });
}

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const OptionalTensor& seq_lens, const OptionalTensor& block_table,
                                  const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                                  const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                  const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                  const OptionalTensor& cu_seqlens_q, const OptionalTensor& tree_mask,
                                  const OptionalTensor& shared, std::optional<double> scale, bool causal,
                                  int64_t window_left, int64_t window_right, double softcap, int64_t num_ctas,
                                  std::optional<ScalarType> out_dtype) {
  const DecodeArgs args{.q = q,
                        .k_cache = k_cache,
                        .v_cache = v_cache,
                        .seq_lens = seq_lens,
                        .block_table = block_table,
                        .cache_batch_idx = cache_batch_idx,
                        .cache_leftpad = cache_leftpad,
                        .alibi_slopes = alibi_slopes,
                        .sinks = sinks,
                        .k_scale = k_scale,
                        .v_scale = v_scale,
                        .cu_seqlens_q = cu_seqlens_q,
                        .tree_mask = tree_mask,
                        .shared = shared,
                        .scores = {.scale = scale, .softcap = softcap},
                        .causal = causal,
                        .window_left = window_left,
                        .window_right = window_right,
                        .num_ctas = num_ctas};
  DecodeCall call(args);
  run({"decode", "q", q}, call.with_outputs(out_dtype));
  return {*call.out, *call.lse};
}

void decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, Tensor out, Tensor lse,
                const OptionalTensor& seq_lens, const OptionalTensor& block_table,
                const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                const OptionalTensor& cu_seqlens_q, const OptionalTensor& tree_mask,
                const OptionalTensor& shared, std::optional<double> scale, bool causal, int64_t window_left,
                int64_t window_right, double softcap, int64_t num_ctas) {
  const DecodeArgs args{.q = q,
                        .k_cache = k_cache,
                        .v_cache = v_cache,
                        .seq_lens = seq_lens,
                        .block_table = block_table,
                        .cache_batch_idx = cache_batch_idx,
                        .cache_leftpad = cache_leftpad,
                        .alibi_slopes = alibi_slopes,
                        .sinks = sinks,
                        .k_scale = k_scale,
                        .v_scale = v_scale,
                        .cu_seqlens_q = cu_seqlens_q,
                        .tree_mask = tree_mask,
                        .shared = shared,
                        .scores = {.scale = scale, .softcap = softcap},
                        .causal = causal,
                        .window_left = window_left,
                        .window_right = window_right,
                        .num_ctas = num_ctas};
  DecodeCall call(args);
  const DecodeParams& params = call.with_outputs(out, lse);
  Argument{"decode", "out", out}.has_memory_of_its_own();
  Argument{"decode", "lse", lse}.has_memory_of_its_own();
  run({"decode", "q", q}, params);
}

}  // namespace
}  // namespace lean

#define LEAN_DECODE_OPTIONS                                                                                  \
  "Tensor? seq_lens=None, Tensor? block_table=None, Tensor? cache_batch_idx=None, "                          \
  "Tensor? cache_leftpad=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, "        \
  "Tensor? v_scale=None, Tensor? cu_seqlens_q=None, Tensor? tree_mask=None, Tensor? shared=None, *, float? " \
  "scale=None, "                                                                                             \
  "bool causal=True, int window_left=-1, int window_right=-1, float softcap=0.0, int num_ctas=0"

STABLE_TORCH_LIBRARY_FRAGMENT(LEAN_OP_LIBRARY, m) {
  m.def("decode(Tensor q, Tensor k_cache, Tensor v_cache, " LEAN_DECODE_OPTIONS
        ", ScalarType? out_dtype=None) -> (Tensor out, Tensor lse)");
  m.def(
      "decode_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!) "
      "lse, " LEAN_DECODE_OPTIONS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_OP_LIBRARY, CPU, m) {
  m.impl("decode", TORCH_BOX(&lean::decode));
  m.impl("decode_out", TORCH_BOX(&lean::decode_out));
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_OP_LIBRARY, CUDA, m) {
  m.impl("decode", TORCH_BOX(&lean::decode));
  m.impl("decode_out", TORCH_BOX(&lean::decode_out));
}
