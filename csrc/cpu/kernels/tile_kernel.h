// The interface between the CPU backend's driver and its tile kernels, one per instruction set.
//
// A tile kernel attends the packed query rows of one output tile to a short run of tokens and
// keeps their partial state. It sees tokens as row pointers only, so that it knows nothing of
// strides, batches or threads.
#pragma once

#include <cstdint>
#include <string>

#include "params.h"
#include "softmax_state.h"

namespace lean::cpu {

// A kernel takes this many tokens at once: their K and V rows stay in L1 or L2 while every row of the output
// tile passes over them. A LeanTile is a whole number of runs.
inline constexpr int kRunTokens = 64;
static_assert(lean_tile_tokens(64) % kRunTokens == 0 && lean_tile_tokens(256) % kRunTokens == 0);

// A run is this short where several heads with long rows are read in one pass, or quantised rows are
// dequantised before they are multiplied. The next run of those is prefetched meanwhile, and dequantising
// takes less time than reading: in two halves, more of the reading is left to the multiplication between
// them.
inline constexpr int kShortRunTokens = kRunTokens / 2;

// One pass over K and V serves at most this many rows; their q and O must stay in L2.
inline constexpr int kMaxRows = 128;
constexpr int max_rows(int64_t head_dim) {
  return head_dim <= 256 ? kMaxRows : kMaxRows / 2;
}

// A microkernel has at most this many rows, whose accumulators stay in registers.
inline constexpr int kMaxMicrokernelRows = 16;

// The most rows of a head with which accumulate_heads adds V of several heads token by token.
inline constexpr int kMaxRowsAdded = 2;

// The longest vector has this many floats.
inline constexpr int kMaxLanes = 16;

// Packed query rows hold at most this many copies of each column, in floats: two where loading both halves of
// a vector is faster than a broadcast of one.
inline constexpr int kMaxQueryCopies = 2;

// The K or the V rows of a run of tokens. Those from `tokens` on are readable and hold finite numbers, so
// that kernels need no tail code: they give what they compute there no weight.
struct Rows {
  int tokens;
  const void* row[kRunTokens];
  const float* scales;  // [kRunTokens], which rows are multiplied by; null: by 1; finite from `tokens` on
};

// What may be prefetched while other rows are multiplied: a window of as many bytes as those, from byte
// `begin` on of `count` rows of `bytes` each. Contiguous rows are given as one long row. With a count of 0
// there is nothing.
struct Prefetch {
  const void* const* rows = nullptr;
  int count = 0;
  int bytes = 0;
  int begin = 0;
  int cache_level = 2;  // 1 or 2: the bytes go into the core's L1 or L2
};

// What a row sees of the current run. All positions are relative to its first token.
struct RowView {
  float begin;  // tokens [begin, end)
  float end;
  float position;   // of the row's query token
  uint64_t hidden;  // bit i: token i is not seen
};

// All values of a quantised dtype in a 16-bit one that holds them exactly.
struct alignas(64) DequantiseTable {
  uint16_t values[256];
  // These are the bytes of the values 0 to 127 (of int8, these numbers; of fp8, whose sign is a bit, all
  // magnitudes).
  uint8_t low[128];
  uint8_t high[128];
};

// The state of one output tile, which is one head's. The arrays belong to the thread that works on it.
struct TileState {
  int rows;
  int head_dim;
  int head_dim_v;
  float scale;                   // of the dot products, to the units of `score`
  ScoreOptions score;            // what is made of them then
  float* slopes;                 // [rows + kMaxLanes], of ALiBi, in units of log2; null: none
  const DequantiseTable* table;  // of quantised rows that are taken as they are
  void* q;                       // packed query rows, in the kernel's own form
  // [rows + kMaxLanes]: the partial state's m and l of each row, and the maximum of the current run's scores;
  // the rest is padding.
  float* m;
  float* l;
  float* run_max;
  float* output;      // [rows, output_stride]: unnormalised O, columns in the kernel's own order
  float* run_output;  // [min(rows, kMaxRowsAdded), output_stride]: what a run adds to it
  float* scores;  // [rows + kMaxMicrokernelRows, kRunTokens], in the kernel's own order: of the current run
  void* scratch;  // of TileKernel::scratch_bytes; all heads of a thread share it
  int64_t output_stride;
};

// In which order a kernel has the columns of O, of each chunk_columns of them: states that have the same one
// can be merged. The first half are the even columns, and then the odd ones; or the first four of each eight,
// and then the last four.
enum class ColumnOrder { natural, even_odd, pairs_of_fours };

struct TileKernel {
  const char* instruction_set;
  // Rows of K and V are multiplied as this dtype.
  DType row_dtype;
  // So many columns are processed at once, a multiple of eight; rows of q and O are padded to a multiple of
  // it.
  int chunk_columns;
  ColumnOrder column_order;
  // The kernel is for output tiles of so many rows or more.
  int min_rows = 1;
  // So many rows are processed at once; q, O and the scores have room for a multiple of it.
  int rows_at_once = 1;
  // score_heads is for heads of at most so many rows.
  int max_rows_for_heads;
  // What a thread needs beside its heads' states, in bytes; null: nothing.
  int64_t (*scratch_bytes)(int64_t dims) = nullptr;
  // Called by a thread before the runs of a range of tokens, and after them; null: nothing is to be done.
  void (*begin_runs)() = nullptr;
  void (*end_runs)() = nullptr;
  // Packs a row of q.
  void (*pack_query)(const TileState& state, int row, const void* q);
  // Attends all rows to a run in two steps: `score` multiplies them with its K rows, `accumulate` adds what
  // the weights make of its V rows. `views` (one per row) may be null if every row sees every token of the
  // run and there are no slopes.
  void (*score)(const TileState& state, const Rows& run, const RowView* views, const Prefetch& prefetch);
  // The same for `count` heads of as many rows, token by token with all heads of each, because their rows of
  // a token adjoin: that is the order of addresses. `run` has the first head's rows, as many tokens as it can
  // hold, or half as many, and no scales. accumulate_heads is for kMaxRowsAdded rows at most.
  void (*score_heads)(const TileState* const* heads, int count, const Rows& run, const RowView* views,
                      const Prefetch& prefetch);
  void (*accumulate)(const TileState& state, const Rows& run, const Prefetch& prefetch);
  void (*accumulate_heads)(const TileState* const* heads, int count, const Rows& run,
                           const Prefetch& prefetch);
  // Writes row * factor in the tensor's dtype.
  void (*write_output)(const TileState& state, int row, float factor, void* out);
  // Null if rows of a quantised cache are taken as they are, with TileState's table. Otherwise converts
  // `count` of them to row_dtype, unscaled, one after another. `table` is dequantise_table of the two dtypes.
  // As many rows of `prefetch` are prefetched.
  void (*dequantise)(DType from, const DequantiseTable& table, const void* const* rows, int count,
                     int columns, void* to, const Prefetch& prefetch);
  // Adds up products of registers, `rounds` times a constant, and returns how many: nothing that attends rows
  // is faster.
  int64_t (*fma_loop)(int64_t rounds);
};

// The best kernel of this machine for output tiles of `rows` rows that is not above the instruction set named
// by the environment variable LEAN_ATTENTION_CPU (read at each call, so that a test can change it). Throws if
// the name is unknown or the machine lacks the instructions.
const TileKernel& tile_kernel(DType dtype, DType cache_dtype, int64_t rows = 1);

// The values are in fp16 for `to` float16, else in bf16.
const DequantiseTable& dequantise_table(DType from, DType to);

// Instruction sets this machine can run, best first, with spaces between.
std::string runnable_instruction_sets();

}  // namespace lean::cpu
