// The ops on tensors, for registration; the Python functions of the same names document them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace lean {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const OptionalTensor& seq_lens, const OptionalTensor& block_table,
                                  const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                                  const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                  const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                  const OptionalTensor& cu_seqlens_q, const OptionalTensor& tree_mask,
                                  std::optional<double> scale, bool causal, int64_t window_left,
                                  int64_t window_right, double softcap, int64_t num_ctas);

// The same into given tensors.
void decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, Tensor out, Tensor lse,
                const OptionalTensor& seq_lens, const OptionalTensor& block_table,
                const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                const OptionalTensor& cu_seqlens_q, const OptionalTensor& tree_mask,
                std::optional<double> scale, bool causal, int64_t window_left, int64_t window_right,
                double softcap, int64_t num_ctas);

std::tuple<Tensor, Tensor> decode_fixed_split(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const OptionalTensor& seq_lens, int64_t splits);
std::tuple<Tensor, Tensor> read_only(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                     const OptionalTensor& seq_lens);

std::tuple<Tensor, Tensor> merge_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                                        double base);

void append_kv(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& seq_lens,
               const OptionalTensor& block_table, const OptionalTensor& cache_batch_idx,
               const OptionalTensor& cu_seqlens, OptionalTensor q, const OptionalTensor& rotary_cos,
               const OptionalTensor& rotary_sin, bool rotary_interleaved, OptionalTensor k_scale,
               OptionalTensor v_scale);

}  // namespace lean
