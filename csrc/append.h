// Appending new tokens to the caches, with rotary embedding: one text for all backends.
#pragma once

#include <cstdint>
#include <limits>

#include "params.h"

namespace lean {

// The rows of new tokens. With cu_seqlens tokens are packed, and the batch stride is 0.
template <class Data>
struct NewRowsOf {
  Data* data;  // [batch, tokens, heads, dims] or [total, heads, dims], the last dimension contiguous
  int64_t batch_stride, token_stride, head_stride;  // in elements

  LEAN_HOST_DEVICE constexpr int64_t offset(int64_t sequence, int64_t token, int64_t head) const {
    return sequence * batch_stride + token * token_stride + head * head_stride;
  }
};

struct AppendParams {
  WritableCacheView k_cache, v_cache;  // their scales are written where `dtype` is another than theirs
  PageTable pages;
  NewRowsOf<const void> k;  // [.., num_kv_heads, head_dim]
  NewRowsOf<const void> v;  // [.., num_kv_heads, head_dim_v]
  NewRowsOf<void> q;        // [.., num_heads, head_dim], or null
  Indices seq_lens;         // [batch], tokens in the caches before; none with a slot mapping
  Indices cu_seqlens;       // [batch + 1] or none
  // [total] or none: the flat slot of each packed token, which then are one sequence's: block * block_size +
  // slot in the block; -1: it is not written.
  Indices slots;
  const void* cos;     // [max_position, rotary_dim / 2] or null
  const void* sin;     // the same
  DType dtype;         // of k, v and q
  DType rotary_dtype;  // of cos and sin
  bool interleaved;    // rotates elements 2i and 2i + 1 with each other, else i and i + rotary_dim / 2
  int64_t batch;
  int64_t tokens;  // per sequence, or of all
  int64_t num_heads, num_kv_heads;
  int64_t max_position, rotary_dim;
  int64_t cos_stride, sin_stride;

  LEAN_HOST_DEVICE constexpr int64_t rows_per_token() const {
    return 2 * num_kv_heads + (q.data ? num_heads : 0);
  }
  LEAN_HOST_DEVICE constexpr int64_t all_tokens() const { return packed() ? tokens : batch * tokens; }
  LEAN_HOST_DEVICE constexpr bool packed() const { return cu_seqlens || slots; }
  LEAN_HOST_DEVICE constexpr bool quantises() const { return k_cache.dtype != dtype; }
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
  if (p.slots) {
    const int64_t slot = p.slots[token];
    if (slot == -1) return t;
    t.sequence = 0;
    if (slot < 0 || slot >= p.pages.num_blocks * p.pages.block_size) return t;
    t.block = slot / p.pages.block_size;
    t.slot = slot % p.pages.block_size;
    return t;
  }
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
  const int64_t seq_len = p.seq_lens[t.sequence];
  t.position = min(seq_len, std::numeric_limits<int64_t>::max() - in_sequence) + in_sequence;
  if (seq_len < 0 || t.position >= p.pages.capacity()) return t;
  const int64_t index = p.pages.block_table ? t.position / p.pages.block_size : 0;
  t.slot = t.position - index * p.pages.block_size;
  const int64_t block = p.pages.raw_block(t.sequence, 0, index);
  t.block = p.pages.is_block(block) ? block : -1;
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
  const auto new_data = [&](const auto& rows, int64_t head) {
    return static_cast<const char*>(rows.data) +
           element_size(p.dtype) * rows.offset(t.sequence, t.index, head);
  };
  const auto into_cache = [&](const void* from, const WritableCacheView& cache, int64_t head,
                              int64_t pairs) -> NewRow {
    if (t.block < 0) return {from, nullptr, nullptr, cache.dims, pairs};
    return {from, cache.address(t.block, t.slot, head),
            p.quantises() ? cache.scale.address(0, t.block, t.slot, head) : nullptr, cache.dims, pairs};
  };
  const bool rotates = p.cos != nullptr && t.position >= 0 && t.position < p.max_position;
  const int64_t pairs = rotates ? p.rotary_dim / 2 : 0;
  if (row < p.num_kv_heads) return into_cache(new_data(p.k, row), p.k_cache, row, pairs);
  row -= p.num_kv_heads;
  if (row < p.num_kv_heads) return into_cache(new_data(p.v, row), p.v_cache, row, 0);
  row -= p.num_kv_heads;
  const char* const q = new_data(p.q, row);
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
