// The interface between the CPU backend's driver and its tile routines, one per instruction set.
//
// A tile routine attends the packed query rows of one output tile to a short run of tokens and
// keeps their partial state. It sees tokens as row pointers only, so that it knows nothing of
// strides, batches or threads.
#pragma once

#include <cstdint>
#include <string>

#include "params.h"
#include "softmax_state.h"

namespace lean::cpu {

// Tokens that a routine takes at once: their K and V rows stay in the first cache levels while
// every row of the output tile passes over them. A LeanTile is a whole number of these.
inline constexpr int kRunTokens = 64;
static_assert(lean_tile_tokens(64) % kRunTokens == 0 && lean_tile_tokens(256) % kRunTokens == 0);

// Rows that one pass over K and V may serve; their O must stay in the second cache level.
inline constexpr int kMaxRows = 64;

// Rows are processed in strips of up to this many, whose accumulators stay in registers.
inline constexpr int kMaxStripRows = 8;

// Rows of a tile that add V of several heads token by token at most.
inline constexpr int kMaxRowsAdded = 2;

// Floats of the longest vector.
inline constexpr int kMaxLanes = 16;

// How many copies of each column packed query rows hold at most, in floats: two where loading both halves of
// a vector is faster than a broadcast of one.
inline constexpr int kMaxQueryCopies = 2;

// A run of tokens. The arrays hold kRunTokens pointers; those from `tokens` on are readable and
// hold finite numbers, so that routines need no tail code: they give what they compute there no weight.
struct Run {
  int tokens;
  const void* k_rows[kRunTokens];
  const void* v_rows[kRunTokens];
  // What the tokens' rows are multiplied by; null: by 1. Finite from `tokens` on.
  const float* k_scales;  // [kRunTokens]
  const float* v_scales;  // [kRunTokens]
};

// Rows that may be prefetched while others are multiplied: as many bytes as these, from byte `begin` on of
// `count` rows of `bytes` each, which may be several that adjoin as one. None if count is 0.
struct RowsAhead {
  const void* const* rows = nullptr;
  int count = 0;
  int bytes = 0;
  int begin = 0;
  int cache_level = 2;  // of the core's, 1 or 2, that they are prefetched into
};

// What a row sees of the current run. Places are relative to its first token.
struct RowView {
  float begin;  // tokens [begin, end)
  float end;
  float position;   // of the row's query token
  uint64_t hidden;  // bit i: token i is not seen
};

// All values of a quantised dtype in a 16-bit one that holds them exactly.
struct alignas(64) WideningTable {
  uint16_t values[256];
  // The bytes of the values 0 to 127 (of int8, these; of fp8, whose sign is a bit, all magnitudes).
  uint8_t low[128];
  uint8_t high[128];
};

// One output tile in work. The arrays belong to the thread that works on it.
struct TileState {
  int rows;
  int head_dim;
  int head_dim_v;
  float scale;    // of the dot products, to units of log2; with a softcap, to units of the softcap
  float softcap;  // in units of log2; 0: none
  float* slopes;  // [rows + kMaxLanes], of ALiBi, in units of log2; null: none
  const WideningTable* table;  // of quantised rows that are taken as they are
  void* q;                     // packed query rows, in the routine's own form
  // [rows + kMaxLanes], the partial state's m and l of each row, and the maximum of the current run's scores;
  // the rest is padding.
  float* m;
  float* l;
  float* run_max;
  float* output;      // [rows, output_stride]: unnormalised O, columns in the routine's own order
  float* run_output;  // [min(rows, kMaxRowsAdded), output_stride]: what a run adds to it
  float* scores;      // [rows + kMaxStripRows, kRunTokens], in the routine's own order: of the current run
  int64_t output_stride;
};

struct TileRoutine {
  const char* instruction_set;
  // What rows of K and V are multiplied as.
  DType row_dtype;
  // Columns that are processed at once; rows of q and O are padded to a multiple of it.
  int chunk_columns;
  // Rows of a tile that score_abreast takes at most.
  int max_rows_abreast;
  // Packs a row of q.
  void (*pack_query)(const TileState& state, int row, const void* q);
  // Attends all rows to a run in two steps: `score` multiplies them with K, `accumulate` adds what the
  // weights make of V. `views` (one per row) may be null if every row sees every token of the run and there
  // are no slopes. `next_q`, if not null, are the packed query rows, as many, that are scored next.
  void (*score)(const TileState& state, const Run& run, const RowView* views, const RowsAhead& ahead,
                const void* next_q);
  // The same for `heads` tiles of as many rows, in the order of addresses: their rows of a token adjoin.
  // `run` has the first one's and as many tokens as it can hold, or half as many, and no scales.
  // accumulate_abreast is for kMaxRowsAdded rows at most.
  void (*score_abreast)(const TileState* const* states, int heads, const Run& run, const RowView* views,
                        const RowsAhead& ahead);
  void (*accumulate)(const TileState& state, const Run& run, const RowsAhead& ahead);
  void (*accumulate_abreast)(const TileState* const* states, int heads, const Run& run,
                             const RowsAhead& ahead);
  // Writes row * factor in the tensor's dtype.
  void (*write_output)(const TileState& state, int row, float factor, void* out);
  // Null if rows of a quantised cache are taken as they are, with TileState's table. Otherwise converts
  // `count` of them to row_dtype, unscaled, one after another. `table` is widening_table of the two. As many
  // rows of `ahead` are prefetched.
  void (*widen)(DType from, const WideningTable& table, const void* const* rows, int count, int columns,
                void* to, const RowsAhead& ahead);
  // Adds up products of registers, `rounds` times a constant, and returns how many: nothing that attends rows
  // is faster.
  int64_t (*multiply)(int64_t rounds);
};

// The best routine of this machine that is not above the instruction set named by the environment
// variable LEAN_ATTENTION_CPU (read at each call, so that a test can change it). Throws if the name
// is unknown or the machine lacks the instructions.
const TileRoutine& tile_routine(DType dtype, DType cache_dtype);

// The routine for a cache of `cache_dtype`, but its `score` and `accumulate` only read the run's rows (and
// what is ahead), so that tiles stay as empty as they are: for benchmarks.
TileRoutine reads_alone(TileRoutine like, DType cache_dtype);

// In fp16 for `to` float16, else in bf16.
const WideningTable& widening_table(DType from, DType to);

// Instruction sets this machine can run, best first, with spaces between.
std::string runnable_instruction_sets();

}  // namespace lean::cpu
