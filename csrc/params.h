// What crosses from the op to a backend: plain pointers and numbers, everything checked before.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "schedule.h"
#include "softmax_state.h"

namespace lean {

// The largest head_dim and head_dim_v.
inline constexpr int64_t kMaxHeadDim = 512;

enum class DType : int32_t { float32, float16, bfloat16, float8_e4m3, float8_e5m2, int8 };

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::float16 || dtype == DType::bfloat16 ? 2 : 1;
}

// A caller's integers, as they are: int32 or int64.
struct Indices {
  const void* data = nullptr;  // null: there are none
  bool is_int64 = false;

  LEAN_HOST_DEVICE constexpr explicit operator bool() const { return data != nullptr; }
  LEAN_HOST_DEVICE constexpr int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  LEAN_HOST_DEVICE const void* address(int64_t i) const {
    return static_cast<const char*>(data) + i * (is_int64 ? sizeof(int64_t) : sizeof(int32_t));
  }
};

// What the rows of a quantised cache are multiplied by, with a stride of 0 in each dimension that it is
// broadcast over. `Float` is const where they are only read.
template <class Float>
struct ScalesOf {
  Float* data = nullptr;  // null: all are 1
  int64_t sequence_stride = 0, block_stride = 0, token_stride = 0, head_stride = 0;

  // The tokens of one sequence and head differ.
  LEAN_HOST_DEVICE constexpr bool per_token() const { return block_stride != 0 || token_stride != 0; }
  LEAN_HOST_DEVICE constexpr Float* address(int64_t sequence, int64_t block, int64_t slot,
                                            int64_t head) const {
    return data +
           (sequence * sequence_stride + block * block_stride + slot * token_stride + head * head_stride);
  }
  LEAN_HOST_DEVICE constexpr float at(int64_t sequence, int64_t block, int64_t slot, int64_t head) const {
    return data ? *address(sequence, block, slot, head) : 1.0f;
  }
};

using Scales = ScalesOf<const float>;

// K or V: one row per token and head. Data and Float are const where the cache is only read.
template <class Data, class Float>
struct CacheViewOf {
  Data* data;  // [num_blocks, block_size, num_kv_heads, dims], the last dimension contiguous
  DType dtype;
  int64_t dims;                                     // head_dim or head_dim_v
  int64_t block_stride, token_stride, head_stride;  // in elements
  ScalesOf<Float> scale;                            // of the rows of a quantised cache

  // Where a row lies: in elements from `data` on, and its address.
  LEAN_HOST_DEVICE constexpr int64_t offset(int64_t block, int64_t slot, int64_t head) const {
    return block * block_stride + slot * token_stride + head * head_stride;
  }
  LEAN_HOST_DEVICE Data* address(int64_t block, int64_t slot, int64_t head) const {
    using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
    return static_cast<Byte*>(data) + element_size(dtype) * offset(block, slot, head);
  }
};
using CacheView = CacheViewOf<const void, const float>;
using WritableCacheView = CacheViewOf<void, float>;

// Which rows of the caches are a sequence's. The caches are blocks of block_size token slots. A paged
// sequence has a list of blocks in block_table; a contiguous cache is one block per slot of the batch, as
// long as max_len, and a sequence has one of them.
struct PageTable {
  Indices block_table;      // [batch, max_blocks] or [batch, num_kv_heads, max_blocks]; none: no pages
  Indices cache_batch_idx;  // [batch], the sequence's slot; none: its index in the batch
  int64_t num_blocks;
  int64_t block_size;
  int64_t max_blocks;                 // of a sequence
  int64_t batch_stride, head_stride;  // of block_table

  // Tokens that a sequence may have.
  LEAN_HOST_DEVICE constexpr int64_t capacity() const { return num_blocks > 0 ? block_size * max_blocks : 0; }
  // What the caller's numbers say, which may be no block.
  LEAN_HOST_DEVICE constexpr int64_t raw_block(int64_t b, int64_t kv_head, int64_t index) const {
    return block_table       ? block_table[b * batch_stride + kv_head * head_stride + index]
           : cache_batch_idx ? cache_batch_idx[b]
                             : b;
  }
  LEAN_HOST_DEVICE constexpr bool is_block(int64_t block) const { return block >= 0 && block < num_blocks; }
};

// Tokens that neighbouring sequences have in common, found where the first of them has them.
struct SharedNode {
  int64_t first_sequence, end_sequence;
  int64_t first_token, end_token;

  LEAN_HOST_DEVICE constexpr bool is_empty() const {
    return first_sequence == 0 && end_sequence == 0 && first_token == 0 && end_token == 0;
  }
};

// A forest of them, parents before their children and siblings in order; some rows may be empty.
struct SharedNodes {
  const int32_t* data = nullptr;  // [count, 4]
  int64_t count = 0;

  LEAN_HOST_DEVICE constexpr SharedNode node(int64_t i) const {
    return {data[4 * i], data[4 * i + 1], data[4 * i + 2], data[4 * i + 3]};
  }
  // The last one before row `before` that has all these sequences, which is the deepest; -1: there is none.
  LEAN_HOST_DEVICE constexpr int64_t deepest(int64_t first_sequence, int64_t end_sequence,
                                             int64_t before) const {
    int64_t i = before - 1;
    LEAN_ROLLED
    while (i >= 0 && !has(i, first_sequence, end_sequence)) --i;
    return i;
  }
  // How many of those before row `before` have them.
  LEAN_HOST_DEVICE constexpr int64_t depth(int64_t first_sequence, int64_t end_sequence,
                                           int64_t before) const {
    int64_t count = 0;
    LEAN_ROLLED
    for (int64_t i = 0; i < before; ++i) count += has(i, first_sequence, end_sequence);
    return count;
  }

  LEAN_HOST_DEVICE constexpr bool has(int64_t i, int64_t first_sequence, int64_t end_sequence) const {
    return data[4 * i] <= first_sequence && end_sequence <= data[4 * i + 1];
  }
};

// Strides are in elements and named after the dimension that they step over; the last dimension of
// q is contiguous. Query tokens [b, i] of a packed q are its tokens cu_seqlens_q[b] + i,
// and its batch stride is 0; the same holds for out, lse and the rows of tree_mask.
struct DecodeParams {
  const void* q;   // [batch, q_len, num_heads, head_dim] or [total_q, num_heads, head_dim]
  CacheView k, v;  // of one dtype: that of q, or a quantised one
  PageTable pages;
  Indices seq_lens;       // [batch] or [batch, num_kv_heads]; none: every sequence is full
  Indices cache_leftpad;  // [batch] or none
  Indices cu_seqlens_q;   // [batch + 1], where q is packed; else none
  SharedNodes shared;
  const bool* tree_mask;      // [batch, q_len, q_len] or [total_q, tree_columns]: new tokens a row sees
  const float* alibi_slopes;  // [batch, num_heads] or null
  const float* sinks;         // [num_heads] or null
  void* out;                  // [batch, q_len, num_heads, head_dim_v] or [total_q, num_heads, head_dim_v]
  float* lse;                 // [batch, num_heads, q_len] or [num_heads, total_q], natural log
  DType dtype;                // of q
  DType out_dtype;            // that of q, or float32
  int64_t batch;
  int64_t query_tokens;  // q_len, or total_q
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t tree_columns;  // q_len, or the most new tokens that tree_mask describes
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t out_batch_stride, out_token_stride, out_head_stride;
  int64_t lse_batch_stride, lse_head_stride;
  int64_t seq_lens_batch_stride, seq_lens_head_stride;
  int64_t tree_batch_stride, tree_row_stride;
  int64_t alibi_batch_stride;
  bool lengths_per_head;
  float scale;    // of q.k, before the softmax
  float softcap;  // scores become softcap * tanh(score / softcap); 0: they stay
  Visibility visibility;
  int64_t num_ctas;  // 0: the backend chooses

  LEAN_HOST_DEVICE constexpr int64_t group() const { return num_heads / num_kv_heads; }
  LEAN_HOST_DEVICE constexpr bool quantised() const { return k.dtype != dtype; }

  // Sequences of the schedule: each KV head is one where it has a length of its own.
  LEAN_HOST_DEVICE constexpr int64_t heads_per_sequence() const {
    return lengths_per_head ? 1 : num_kv_heads;
  }
  LEAN_HOST_DEVICE constexpr int64_t sequences() const { return batch * num_kv_heads / heads_per_sequence(); }
  LEAN_HOST_DEVICE constexpr Geometry geometry(int64_t rows_per_block, int64_t tile_tokens) const {
    return {num_kv_heads, lengths_per_head, heads_per_sequence(), group(), rows_per_block,
            tile_tokens,  visibility};
  }

  // What a caller's numbers say, and what is made of them: brought into range, so that nothing outside a
  // tensor is read or written.
  LEAN_HOST_DEVICE constexpr int64_t raw_seq_len(int64_t b, int64_t kv_head) const {
    return seq_lens ? seq_lens[b * seq_lens_batch_stride + kv_head * seq_lens_head_stride] : pages.capacity();
  }
  LEAN_HOST_DEVICE constexpr int64_t raw_leftpad(int64_t b) const {
    return cache_leftpad ? cache_leftpad[b] : 0;
  }
  LEAN_HOST_DEVICE constexpr int64_t first_query(int64_t b) const {
    return cu_seqlens_q ? max(0, min(cu_seqlens_q[b], query_tokens)) : 0;
  }
  LEAN_HOST_DEVICE constexpr SequenceLength clamped_length(int64_t b, int64_t kv_head) const {
    return {max(0, min(raw_seq_len(b, kv_head), pages.capacity())),
            max(0, min(raw_leftpad(b), pages.capacity())),
            cu_seqlens_q ? max(0, first_query(b + 1) - first_query(b)) : query_tokens};
  }
  // Query tokens of the sequences before b.
  LEAN_HOST_DEVICE constexpr int64_t first_row(int64_t b) const {
    return cu_seqlens_q ? first_query(b) : b * query_tokens;
  }
  LEAN_HOST_DEVICE constexpr int64_t total_query_tokens() const {
    return cu_seqlens_q ? query_tokens : batch * query_tokens;
  }
  // What a node contributes to the schedule.
  LEAN_HOST_DEVICE constexpr SequenceLength node_length(const SharedNode& node) const {
    return {node.end_token, node.first_token, first_row(node.end_sequence) - first_row(node.first_sequence),
            true};
  }
  LEAN_HOST_DEVICE constexpr SequenceLength scheduled_length(int64_t sequence) const {
    return lengths_per_head ? clamped_length(sequence / num_kv_heads, sequence % num_kv_heads)
                            : clamped_length(sequence, 0);
  }
};

// What a caller says of all scores.
struct ScoreArgs {
  std::optional<double> scale;  // none: 1 / sqrt(head_dim)
  double softcap = 0.0;
};

// What a call makes of all its scores; score-inl.h has the order.
struct ScoreOptions {
  float unit;     // brings scaled dot products to units of log2; with a softcap, to units of that
  float softcap;  // in units of log2; 0: none

  // Scaled dot products are the scores.
  LEAN_HOST_DEVICE constexpr bool only_scale() const { return softcap == 0.0f; }
};
LEAN_HOST_DEVICE constexpr ScoreOptions score_options(const DecodeParams& p) {
  return {p.softcap == 0.0f ? kLog2e : 1.0f / p.softcap, p.softcap * kLog2e};
}

// Partial attention states to merge: outs[i] and lses[i] are the i-th state of every row.
struct MergeParams {
  const void* const* outs;   // num_states x [batch, q_len, num_heads, head_dim_v], contiguous
  const float* const* lses;  // num_states x [batch, num_heads, q_len], contiguous
  void* out;                 // [batch, q_len, num_heads, head_dim_v], contiguous
  float* lse;                // [batch, num_heads, q_len], contiguous
  DType dtype;               // of outs
  DType out_dtype;           // float32, float16 or bfloat16
  int64_t num_states;
  int64_t batch;
  int64_t q_len;
  int64_t num_heads;
  int64_t head_dim_v;
  float log2_base;  // of the base of lses and lse
};

}  // namespace lean
