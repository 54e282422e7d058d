// What is decided once per call, before any K or V is read: how rows, heads and tokens are cut, and into how
// many ranges for how many threads. Pure: it follows from the params (lengths are read from their tensors),
// what the kernel can do, a row of Tuning and the number of threads.
#pragma once

#include <vector>

#include "cpu/kernels/tile_kernel.h"
#include "cpu/lean_ranges.h"
#include "cpu/sharing.h"
#include "cpu/tuning.h"

namespace lean::cpu {

// No row of Tuning has a pass with more heads; threads have room for so many.
inline constexpr int64_t kMaxHeadsPerPass = 32;

// Partial states begin at cache lines.
inline constexpr int64_t kCacheLineFloats = 16;

struct Plan {
  // Rows of a quantised cache are converted before they are multiplied, run by run.
  bool dequantises;
  int run_tokens;  // kRunTokens or kShortRunTokens

  // How rows are prefetched: see Tuning.
  int prefetch_level;
  int64_t touch_tokens;

  int64_t rows_per_block;  // query rows that share one pass over K and V
  int64_t heads_per_pass;  // KV heads whose tokens a thread takes together, at most
  int64_t partial_floats;  // of one published partial state

  // To the schedule, the heads of a pass are one: a LeanTile is some tokens of them all, and a thread reads
  // their rows together, which is contiguous memory.
  Geometry geometry;
  std::vector<int64_t> sequence_begin;  // where each sequence's LeanTiles begin, then their number
  LeanRanges ranges;
  int64_t threads;
};

// The most rows that an output tile of this call has: as many as it has, or max_rows.
int64_t most_rows(const DecodeParams& params, const Sharing& sharing);

// The tile kernels of a call: for output tiles of `many.min_rows` rows and more, and for those of fewer.
struct Kernels {
  TileKernel many, few;

  const TileKernel& of(int64_t rows) const { return rows < many.min_rows ? few : many; }
};
// Tiles may be of different kernels where none of these merges another's states, or both have them in one
// order. (Of quantised caches they are of two that dequantise alike, or of one.)
Kernels choose_kernels(const DecodeParams& params, const Sharing& sharing);

// `max_heads_per_pass` limits what the tuning allows.
Plan make_plan(const DecodeParams& params, const Sharing& sharing, const TileKernel& kernel,
               const Tuning& tuning, int64_t max_threads, int64_t max_heads_per_pass = kMaxHeadsPerPass);

}  // namespace lean::cpu
