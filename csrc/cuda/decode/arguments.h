// What a launch of the decode kernel is told, and the table of the compiled kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <span>

#include "cuda/decode/fix_up.h"
#include "cuda/errors.h"
#include "fail.h"
#include "params.h"
#include "shared_walk.h"

namespace lean::cuda {

// The schedule on a GPU. The host sees to it that its numbers fit: see geometry32.
using Geometry32 = GeometryOf<int32_t, FastDivisor>;
using Length32 = SequenceLengthOf<int32_t>;
using Segment32 = SegmentOf<int32_t>;
using SegmentWalk32 = SegmentWalkOf<int32_t, FastDivisor>;
using SharedWalk32 = SharedWalkOf<int32_t, FastDivisor>;

struct DecodeArguments {
  DecodeParams p;
  Geometry32 geometry;
  FastDivisor block_size;
  FastDivisor q_len;  // where q is not packed
  int32_t num_blocks;
  int32_t capacity;  // tokens that a sequence may have
  Workspace workspace;
  ErrorRecord* errors;
  FastDivisor min_tiles_per_cta;
  bool ragged;  // sequences may differ in their LeanTiles
  // A step of 16 tokens lies in one block, where in pages it begins at a multiple of 16 slots, and each of
  // its rows begins and ends at a multiple of 16 bytes: it is copied 16 bytes at a time, from addresses that
  // are equally far apart.
  bool whole_steps;
  int32_t k_block_bytes, k_token_bytes, v_block_bytes, v_token_bytes;  // strides, where steps are whole
  int32_t k_chunks, v_chunks;                                          // of 16 bytes, likewise, in a row
  bool aligned_q;    // rows of q begin and end at multiples of 16 bytes
  bool aligned_out;  // rows of out begin at multiples of 4 bytes, of float32 at multiples of 16
  bool only_scale;   // scaled dot products are the scores, but for masks
  ScoreOptions score;
  float scale;  // of dot products, to units of `score`
};

// ---- On the host.

constexpr int kMaxDevices = 64;

struct Kernel {
  int head_dim;
  int head_dim_v;
  int rows;
  bool quantised;  // its caches
  int64_t tile_tokens;
  int shared_bytes;
  int64_t partial_floats;
  int bytes_in_flight;
  void (*function)(DecodeArguments);
  std::atomic<int64_t>* resident_ctas;  // per device; 0: not asked yet
};

std::span<const Kernel> kernels_of(DType dtype);

struct Dimension {
  int64_t size;
  int64_t stride_bytes;
};

// Every row begins at a multiple of so many bytes. The stride of a dimension of size 1 leads nowhere, and
// torch lets it be anything.
inline bool has_aligned_rows(const void* data, std::initializer_list<Dimension> dimensions, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         std::all_of(dimensions.begin(), dimensions.end(),
                     [&](const Dimension& d) { return d.size == 1 || d.stride_bytes % bytes == 0; });
}

// A sequence of more tokens would take 2 TB with the smallest head of bf16.
inline constexpr int64_t kMaxTokens = int64_t{1} << 30;

// Throws std::invalid_argument where a call's numbers pass 32 bits; `most_tiles` is how many LeanTiles it may
// have.
inline Geometry32 geometry32(const DecodeParams& p, int64_t rows_per_block, int64_t tile_tokens,
                             int64_t most_tiles) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (p.pages.capacity() > kMaxTokens) {
    fail("decode: a sequence may have ", p.pages.capacity(), " tokens; on cuda it may have ", kMaxTokens);
  }
  // The rows of a sequence, or of a node, which may have all sequences.
  const int64_t rows = p.group() * (p.shared.count > 0 ? p.total_query_tokens() : p.query_tokens);
  if (rows > kMost - rows_per_block || p.sequences() > kMost - p.shared.count || most_tiles > kMost) {
    fail("decode: the batch may have ", most_tiles, " LeanTiles, ", rows,
         " query rows per KV head; on cuda each may be at most ", kMost);
  }
  const auto window = [](int64_t tokens) {  // one that holds all tokens is as none
    return tokens >= kMaxTokens ? -1 : static_cast<int32_t>(tokens);
  };
  return {.num_kv_heads = static_cast<int32_t>(p.num_kv_heads),
          .lengths_per_head = p.lengths_per_head,
          .passes = static_cast<int32_t>(p.heads_per_sequence()),
          .group = FastDivisor(static_cast<int32_t>(p.group())),
          .rows_per_block = static_cast<int32_t>(rows_per_block),
          .tile_tokens = static_cast<int32_t>(tile_tokens),
          .visibility = {window(p.visibility.window_left), window(p.visibility.window_right)}};
}

inline DecodeArguments decode_arguments(const DecodeParams& p, const Geometry32& geometry,
                                        const Workspace& workspace, ErrorRecord* errors,
                                        int64_t min_tiles_per_cta) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto bytes = [&](const CacheView& cache, int64_t stride) {
    return stride * element_size(cache.dtype);
  };
  const bool paged = bool{p.pages.block_table};
  const auto has_whole_steps = [&](const CacheView& cache) {
    const Dimension blocks{p.pages.num_blocks, bytes(cache, cache.block_stride)};
    const Dimension tokens{p.pages.block_size, bytes(cache, cache.token_stride)};
    const Dimension heads{p.num_kv_heads, bytes(cache, cache.head_stride)};
    return has_aligned_rows(cache.data, {blocks, tokens, heads}, 16) && bytes(cache, cache.dims) % 16 == 0 &&
           std::abs(tokens.stride_bytes) <= kMost &&
           (!paged || (p.pages.block_size % 16 == 0 && std::abs(blocks.stride_bytes) <= kMost));
  };
  // Of q and out; `size` is that of their elements.
  const auto has_aligned_heads = [&](const void* data, int64_t size, int64_t batch, int64_t token,
                                     int64_t head, int64_t to) {
    return has_aligned_rows(data,
                            {{p.cu_seqlens_q ? 1 : p.batch, size * batch},
                             {p.query_tokens, size * token},
                             {p.num_heads, size * head}},
                            to);
  };
  const int64_t out_size = element_size(p.out_dtype);
  const bool aligned_out = has_aligned_heads(p.out, out_size, p.out_batch_stride, p.out_token_stride,
                                             p.out_head_stride, out_size == 4 ? 16 : 4);
  const auto int32 = [](int64_t n) { return static_cast<int32_t>(n); };
  return {.p = p,
          .geometry = geometry,
          .block_size = FastDivisor(int32(std::max<int64_t>(1, std::min(p.pages.block_size, kMost)))),
          .q_len = FastDivisor(int32(std::max<int64_t>(1, p.query_tokens))),
          .num_blocks = int32(std::min(p.pages.num_blocks, kMost)),
          .capacity = int32(p.pages.capacity()),
          .workspace = workspace,
          .errors = errors,
          .min_tiles_per_cta = FastDivisor(int32(min_tiles_per_cta)),
          .ragged = p.seq_lens || p.cache_leftpad || p.cu_seqlens_q || p.shared.count > 0,
          .whole_steps = has_whole_steps(p.k) && has_whole_steps(p.v),
          .k_block_bytes = int32(bytes(p.k, p.k.block_stride)),
          .k_token_bytes = int32(bytes(p.k, p.k.token_stride)),
          .v_block_bytes = int32(bytes(p.v, p.v.block_stride)),
          .v_token_bytes = int32(bytes(p.v, p.v.token_stride)),
          .k_chunks = int32(bytes(p.k, p.k.dims) / 16),
          .v_chunks = int32(bytes(p.v, p.v.dims) / 16),
          .aligned_q = p.k.dims % 8 == 0 &&
                       has_aligned_heads(p.q, 2, p.q_batch_stride, p.q_token_stride, p.q_head_stride, 16),
          .aligned_out = aligned_out,
          .only_scale = p.softcap == 0.0f && p.alibi_slopes == nullptr,
          .score = score_options(p),
          .scale = p.scale * score_options(p).unit};
}

}  // namespace lean::cuda
