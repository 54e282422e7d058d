// Appending new tokens to the caches, with rotary embedding: one text for all backends.
#pragma once

#include <cstdint>

#include "params.h"

namespace lean {

// The scales of a quantised cache's rows.
struct RowScales {
  float* data;  // [num_blocks, block_size, num_kv_heads]
  int64_t block_stride, token_stride, head_stride;
};

// Strides are in elements; the last dimensions are contiguous. With cu_seqlens the tokens of k, v and q are
// packed, as in DecodeParams.
struct AppendParams : CacheBlocks {
  void* k_cache;              // [num_blocks, block_size, num_kv_heads, head_dim]
  void* v_cache;              // [num_blocks, block_size, num_kv_heads, head_dim_v]
  const void* k;              // [batch, tokens, num_kv_heads, head_dim] or [total, ...]
  const void* v;              // [batch, tokens, num_kv_heads, head_dim_v] or [total, ...]
  void* q;                    // [batch, tokens, num_heads, head_dim] or [total, ...], or null
  const int32_t* seq_lens;    // [batch], tokens in the caches before
  const int32_t* cu_seqlens;  // [batch + 1] or null
  const void* cos;            // [max_position, rotary_dim / 2] or null
  const void* sin;
  RowScales k_scale, v_scale;  // written where cache_dtype is another than dtype
  DType dtype;                 // of k, v and q
  DType cache_dtype;           // the same, or what rows are quantised to
  DType rotary_dtype;          // of cos and sin
  bool interleaved;  // rotates elements 2i and 2i + 1 with each other, else i and i + rotary_dim / 2
  int64_t batch;
  int64_t tokens;  // per sequence, or of all
  int64_t num_heads, num_kv_heads, head_dim, head_dim_v;
  int64_t max_position, rotary_dim;
  int64_t k_cache_block_stride, k_cache_token_stride, k_cache_head_stride;
  int64_t v_cache_block_stride, v_cache_token_stride, v_cache_head_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t v_batch_stride, v_token_stride, v_head_stride;
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t cos_stride, sin_stride;

  LEAN_HOST_DEVICE constexpr int64_t rows_per_token() const { return 2 * num_kv_heads + (q ? num_heads : 0); }
  LEAN_HOST_DEVICE constexpr int64_t all_tokens() const { return cu_seqlens ? tokens : batch * tokens; }
  LEAN_HOST_DEVICE constexpr bool quantises() const { return cache_dtype != dtype; }
};

// A new token: whose it is, and where it goes.
struct NewToken {
  int64_t sequence;  // -1: no sequence's
  int64_t index;     // in its sequence, or in the packed tensors
  int64_t position;  // in the cache
  int64_t block;     // -1: none
  int64_t slot;
};

LEAN_HOST_DEVICE constexpr NewToken new_token(const AppendParams& p, int64_t token) {
  NewToken t{-1, token, 0, -1, 0};
  int64_t in_sequence = 0;
  if (p.cu_seqlens) {
    int64_t low = 0, high = p.batch;  // the last sequence that begins at or before the token
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.cu_seqlens[middle] <= token ? low : high) = middle;
    }
    if (p.batch == 0 || token < p.cu_seqlens[low] || token >= p.cu_seqlens[low + 1]) return t;
    t.sequence = low;
    in_sequence = token - p.cu_seqlens[low];
  } else {
    t.sequence = token / p.tokens;
    t.index = in_sequence = token % p.tokens;
  }
  t.position = p.seq_lens[t.sequence] + in_sequence;
  if (p.seq_lens[t.sequence] < 0 || t.position >= p.capacity()) return t;
  const int64_t index = p.block_table ? t.position / p.block_size : 0;
  t.slot = t.position - index * p.block_size;
  const int64_t block = p.raw_block(t.sequence, 0, index);
  t.block = p.is_block(block) ? block : -1;
  return t;
}

// Numbers::to_float and Numbers::from_float<T>: the backend's conversions.
template <class Numbers, class T>
LEAN_HOST_DEVICE float rotary_value(const AppendParams& p, const void* table, int64_t stride,
                                    int64_t position, int64_t i) {
  const int64_t at = position * stride + i;
  return p.rotary_dtype == DType::float32 ? static_cast<const float*>(table)[at]
                                          : Numbers::to_float(static_cast<const T*>(table)[at]);
}

// A row of a new token: K heads come first, then V heads, then those of q.
struct NewRow {
  const void* from;
  void* to;       // null: it has no place in the caches; `from`: q is rotated in place
  float* scale;   // null where it is not quantised
  int64_t dims;   // to write
  int64_t pairs;  // to rotate
};

LEAN_HOST_DEVICE inline NewRow new_row(const AppendParams& p, const NewToken& t, int64_t row) {
  const auto element = [&](const void* data, int64_t batch_stride, int64_t token_stride, int64_t head) {
    const int64_t at = t.sequence * batch_stride + t.index * token_stride + head;
    return static_cast<const char*>(data) + at * element_size(p.dtype);
  };
  const auto place = [&](void* data, int64_t block_stride, int64_t token_stride, int64_t head) -> void* {
    const int64_t at = t.block * block_stride + t.slot * token_stride + head;
    return t.block < 0 ? nullptr : static_cast<char*>(data) + at * element_size(p.cache_dtype);
  };
  const auto place_of_scale = [&](const RowScales& s, int64_t head) -> float* {
    if (!p.quantises() || t.block < 0) return nullptr;
    return s.data + (t.block * s.block_stride + t.slot * s.token_stride + head * s.head_stride);
  };
  const int64_t pairs = p.cos != nullptr && t.position < p.max_position ? p.rotary_dim / 2 : 0;
  if (row < p.num_kv_heads) {
    return {element(p.k, p.k_batch_stride, p.k_token_stride, row * p.k_head_stride),
            place(p.k_cache, p.k_cache_block_stride, p.k_cache_token_stride, row * p.k_cache_head_stride),
            place_of_scale(p.k_scale, row), p.head_dim, pairs};
  }
  row -= p.num_kv_heads;
  if (row < p.num_kv_heads) {
    return {element(p.v, p.v_batch_stride, p.v_token_stride, row * p.v_head_stride),
            place(p.v_cache, p.v_cache_block_stride, p.v_cache_token_stride, row * p.v_cache_head_stride),
            place_of_scale(p.v_scale, row), p.head_dim_v, 0};
  }
  row -= p.num_kv_heads;
  const char* const q = element(p.q, p.q_batch_stride, p.q_token_stride, row * p.q_head_stride);
  return {q, const_cast<char*>(q), nullptr, 2 * pairs, pairs};
}

// Calls use(i, x) for each element i of a row as a cache of dtype T would hold it. They are those of thread
// `first` of `step` threads.
template <class Numbers, class T, class Use>
LEAN_HOST_DEVICE void for_each_element(const AppendParams& p, const NewToken& t, const NewRow& row,
                                       int64_t first, int64_t step, const Use& use) {
  const T* const from = static_cast<const T*>(row.from);
  if constexpr (sizeof(T) > 1) {
    for (int64_t i = first; i < row.pairs; i += step) {
      const int64_t at = p.interleaved ? 2 * i : i, other = p.interleaved ? at + 1 : i + row.pairs;
      const float cos = rotary_value<Numbers, T>(p, p.cos, p.cos_stride, t.position, i);
      const float sin = rotary_value<Numbers, T>(p, p.sin, p.sin_stride, t.position, i);
      const float a = Numbers::to_float(from[at]), b = Numbers::to_float(from[other]);
      // Products are rounded, everywhere: the bits of a row decide on its scale.
      use(at, Numbers::template from_float<T>(Numbers::multiply(a, cos) - Numbers::multiply(b, sin)));
      use(other, Numbers::template from_float<T>(Numbers::multiply(b, cos) + Numbers::multiply(a, sin)));
    }
  }
  for (int64_t i = 2 * row.pairs + first; i < row.dims; i += step) use(i, from[i]);
}

template <class Numbers, class T>
LEAN_HOST_DEVICE void append_row(const AppendParams& p, const NewToken& t, const NewRow& row, int64_t first,
                                 int64_t step) {
  if (row.to == nullptr) return;
  T* const to = static_cast<T*>(row.to);
  for_each_element<Numbers, T>(p, t, row, first, step, [to](int64_t i, T x) { to[i] = x; });
}

}  // namespace lean
