// The arguments of decode and of its variants: checked, and made into parameters.
#pragma once

#include <array>

#include "ops/tensor_args.h"

namespace lean {

// A call's arguments by name, as the op has them; lean_attention.decode documents them.
struct DecodeArgs {
  const Tensor& q;
  const Tensor& k_cache;
  const Tensor& v_cache;
  const OptionalTensor& seq_lens = kNoTensor;
  const OptionalTensor& block_table = kNoTensor;
  const OptionalTensor& cache_batch_idx = kNoTensor;
  const OptionalTensor& cache_leftpad = kNoTensor;
  const OptionalTensor& alibi_slopes = kNoTensor;
  const OptionalTensor& sinks = kNoTensor;
  const OptionalTensor& k_scale = kNoTensor;
  const OptionalTensor& v_scale = kNoTensor;
  const OptionalTensor& cu_seqlens_q = kNoTensor;
  const OptionalTensor& tree_mask = kNoTensor;
  const OptionalTensor& shared = kNoTensor;
  ScoreArgs scores = {};
  bool causal = true;
  int64_t window_left = -1;
  int64_t window_right = -1;
  int64_t num_ctas = 0;
};

// A call's parameters and the tensors that they point into.
class DecodeCall {
 public:
  // Throws std::invalid_argument where arguments do not fit. Numbers inside tensors are the backend's to
  // check.
  explicit DecodeCall(const DecodeArgs& args);

  // Takes the caller's outputs, or makes fresh ones, of q's dtype where none is given.
  const DecodeParams& with_outputs(const Tensor& given_out, const Tensor& given_lse);
  const DecodeParams& with_outputs(std::optional<ScalarType> out_dtype = std::nullopt);

  OptionalTensor out, lse;

 private:
  // Each sets the parameters that its arguments tell, and may use those that earlier ones have set.
  void take_queries();     // q, batch, query_tokens, num_heads and their strides, dtype, cu_seqlens_q
  void take_caches();      // k, v but for their scales, num_kv_heads
  void take_lengths();     // seq_lens and their strides, lengths_per_head, cache_leftpad
  void take_pages();       // pages
  void take_visibility();  // visibility, tree_mask and its strides
  void take_scores();      // scale, softcap, alibi_slopes, sinks
  void take_shared();      // shared
  Scales scales(const char* name, const OptionalTensor& tensor) const;

  DType cache_dtype() const;
  void check_out_dtype(const char* name, ScalarType dtype) const;
  Indices integers(const Argument& arg);
  const float* floats(const Argument& arg);
  template <int rank>
  Tensor fresh_tensor(const std::array<int64_t, rank>& sizes, int32_t dtype) const;

  const Argument q_, k_, v_;
  const DecodeArgs& a_;
  DecodeParams p_{};
  Copies copies_;
};

}  // namespace lean
