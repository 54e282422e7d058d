// The memory of a call: what lean ranges publish, and what threads work in.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/cache_rows.h"
#include "cpu/partial.h"
#include "cpu/scratch_memory.h"

namespace lean::cpu {

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

// One of the heads that a thread takes abreast through a segment.
struct Work {
  int64_t kv_head;
  TileState tile;
  Partial aside;
};

class WorkingMemory {
 public:
  // For output tiles of up to `rows`. `table` is null where caches have q's dtype.
  WorkingMemory(const DecodeParams& params, const TileRoutine& routine, const WideningTable* table,
                int64_t rows)
      : p_(params),
        table_(table),
        rows_(rows),
        padded_head_dim_(round_up(params.head_dim, routine.chunk_columns)),
        padded_head_dim_v_(round_up(params.head_dim_v, routine.chunk_columns)),
        wide_floats_(WideRows::are_needed(routine, table)
                         ? round_up(WideRows::memory_floats(params, routine), kCacheLineFloats)
                         : 0) {}

  // Of a partial state.
  int64_t partial_floats() const { return round_up(rows_ * (padded_head_dim_v_ + 2), kCacheLineFloats); }

  // Slots for `partials` partial states, and memory for threads that take up to `heads` heads abreast. It is
  // the calling thread's, until its next call.
  void reserve(int64_t partials, int64_t threads, int64_t heads) {
    static thread_local ScratchMemory memory;
    heads_ = heads;
    slots_ = memory.reserve(partials * partial_floats() + threads * thread_floats());
    threads_ = slots_ + partials * partial_floats();
  }

  Partial slot(int64_t i) const { return partial_at(slots_ + i * partial_floats()); }

  std::array<Work, kMaxAbreast> works_of(int64_t thread) const {
    std::array<Work, kMaxAbreast> works{};
    for (int64_t i = 0; i < heads_; ++i) {
      float* memory = threads_ + thread * thread_floats() + i * work_floats();
      float* const run_output = run_outputs(thread) + i * run_output_floats();
      works[i] = {0, tile_state(memory + partial_floats(), run_output), partial_at(memory)};
    }
    return works;
  }

  // Of a thread's WideRows.
  float* wide_rows(int64_t thread) const { return run_outputs(thread) + heads_ * run_output_floats(); }

 private:
  static constexpr int64_t kCacheLineFloats = 16;

  // A thread has the memory of its Works, then their run_outputs, then that of its WideRows. Run_outputs are
  // neighbours, so that those of heads abreast, which are written in turn, are in different places of the
  // first cache level.
  int64_t thread_floats() const { return heads_ * (work_floats() + run_output_floats()) + wide_floats_; }
  float* run_outputs(int64_t thread) const {
    return threads_ + thread * thread_floats() + heads_ * work_floats();
  }
  int64_t run_output_floats() const { return std::min<int64_t>(rows_, kMaxRowsAdded) * padded_head_dim_v_; }

  Partial partial_at(float* output) const {
    float* m = output + rows_ * padded_head_dim_v_;
    return {output, m, m + rows_};
  }

  // The memory of a Work: a partial state set aside, then what its TileState points to.
  int64_t work_floats() const {
    return partial_floats() + rows_ * (kMaxQueryCopies * padded_head_dim_ + padded_head_dim_v_) +
           4 * stats_floats() + kRunTokens * (rows_ + kMaxStripRows);
  }
  int64_t stats_floats() const { return round_up(rows_ + kMaxLanes, kCacheLineFloats); }
  TileState tile_state(float* memory, float* run_output) const {
    TileState t{};
    t.head_dim = static_cast<int>(p_.head_dim);
    t.head_dim_v = static_cast<int>(p_.head_dim_v);
    t.softcap = p_.softcap * kLog2e;
    t.output_stride = padded_head_dim_v_;
    t.table = table_;
    t.q = memory;
    t.output = memory + rows_ * kMaxQueryCopies * padded_head_dim_;
    t.run_output = run_output;
    t.scores = t.output + rows_ * padded_head_dim_v_;
    t.m = t.scores + kRunTokens * (rows_ + kMaxStripRows);
    t.l = t.m + stats_floats();
    t.run_max = t.l + stats_floats();
    // Routines read the padding rows' numbers, without using what comes of it.
    std::fill_n(t.m, 3 * stats_floats(), 0.0f);
    if (p_.alibi_slopes != nullptr) t.slopes = t.run_max + stats_floats();
    return t;
  }

  const DecodeParams& p_;
  const WideningTable* const table_;
  const int64_t rows_;
  const int64_t padded_head_dim_;
  const int64_t padded_head_dim_v_;
  const int64_t wide_floats_;
  int64_t heads_ = 0;
  float* slots_ = nullptr;
  float* threads_ = nullptr;  // after the slots
};

}  // namespace lean::cpu
