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

// A run of tokens. The arrays hold kRunTokens pointers; those from `tokens` on repeat a valid one,
// so that routines need no tail code: they compute garbage there and give it no weight.
struct Run {
  int tokens;
  const void* k_rows[kRunTokens];
  const void* v_rows[kRunTokens];
};

// Tokens of the current run that a row may see, relative to its first token.
struct RowSpan {
  float begin;
  float end;
};

// One output tile in work. The arrays belong to the thread that works on it.
struct TileState {
  int rows;
  int head_dim;
  int head_dim_v;
  float scale;  // scale * log2(e)
  void* q;      // packed query rows, in the routine's own form
  float* m;     // [rows + kMaxStripRows], the partial state's m and l of each row; the rest is padding
  float* l;
  float* output;  // [rows, output_stride]: unnormalised O, columns in the routine's own order
  float* scores;  // scratch of kRunTokens * kMaxStripRows floats
  int64_t output_stride;
};

struct TileRoutine {
  const char* instruction_set;
  // Columns that are processed at once; rows of q and O are padded to a multiple of it.
  int chunk_columns;
  // Packs a row of q.
  void (*pack_query)(const TileState& state, int row, const void* q);
  // Attends all rows to a run. `spans` (one per row) is null if every row sees every token of the
  // run. `next`, if not null, is the run that follows: it may be prefetched.
  void (*attend)(const TileState& state, const Run& run, const RowSpan* spans, const Run* next);
  // Writes row / l in the tensor's dtype.
  void (*write_output)(const TileState& state, int row, void* out);
};

// The best routine of this machine that is not above the instruction set named by the environment
// variable LEAN_ATTENTION_CPU (read at each call, so that a test can change it). Throws if the name
// is unknown or the machine lacks the instructions.
const TileRoutine& tile_routine(DType dtype);

// Instruction sets this machine can run, best first, with spaces between.
std::string runnable_instruction_sets();

}  // namespace lean::cpu
