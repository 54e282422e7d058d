// What crosses from the op to a backend: plain pointers and numbers, everything checked before.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace lean {

enum class DType : int32_t { float32, float16, bfloat16 };

// Strides are in elements and named after the dimension that they step over; the last dimension of
// q and of the caches is contiguous.
struct DecodeParams {
  const void* q;            // [batch, q_len, num_heads, head_dim]
  const void* k_cache;      // [batch, max_len, num_kv_heads, head_dim]
  const void* v_cache;      // [batch, max_len, num_kv_heads, head_dim_v]
  const int32_t* seq_lens;  // [batch], or null: every sequence has max_len tokens
  void* out;                // [batch, q_len, num_heads, head_dim_v], contiguous
  float* lse;               // [batch, num_heads, q_len], contiguous, natural log
  DType dtype;              // of q, k_cache, v_cache and out
  int64_t batch;
  int64_t num_heads;
  int64_t max_len;
  int64_t head_dim;
  int64_t head_dim_v;
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t v_batch_stride, v_token_stride, v_head_stride;
  int64_t seq_lens_stride;
  float scale;  // of q.k, before the softmax
  int64_t num_kv_heads;
  Visibility visibility;  // q_len and which tokens a query token sees
  int64_t num_ctas;       // 0: the backend chooses

  constexpr int64_t group() const { return num_heads / num_kv_heads; }
};

// Partial attention states to merge: outs[i] and lses[i] are the i-th state of every row.
struct MergeParams {
  const void* const* outs;   // num_states x [batch, q_len, num_heads, head_dim_v], contiguous
  const float* const* lses;  // num_states x [batch, num_heads, q_len], contiguous, natural log
  void* out;                 // [batch, q_len, num_heads, head_dim_v], contiguous
  float* lse;                // [batch, num_heads, q_len], contiguous
  DType dtype;               // of outs and out
  int64_t num_states;
  int64_t batch;
  int64_t q_len;
  int64_t num_heads;
  int64_t head_dim_v;
};

}  // namespace lean
