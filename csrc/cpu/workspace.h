// What a call works in: the partial states that lean ranges publish, and each thread's own memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <new>

#include "cpu/kv_reader.h"

namespace lean::cpu {

// A partial state that was saved: O of every row, then m and l of every row.
struct Partial {
  float* output;
  float* m;
  float* l;
};

inline void clear(const TileState& t) {
  std::fill_n(t.m, t.rows, kMinusInfinity);
  // Lanes beyond the rows take part in the choice of when a vector of rows is rescaled: what they hold must
  // not be an earlier tile's.
  std::fill_n(t.m + t.rows, kMaxLanes, 0.0f);
  std::fill_n(t.l, t.rows, 0.0f);
  std::fill_n(t.output, t.rows * t.output_stride, 0.0f);
}

inline void save(const TileState& t, const Partial& to) {
  std::copy_n(t.output, t.rows * t.output_stride, to.output);
  std::copy_n(t.m, t.rows, to.m);
  std::copy_n(t.l, t.rows, to.l);
}

inline void merge_into(const TileState& t, const Partial& from) {
  for (int row = 0; row < t.rows; ++row) {
    const Merged merged = merge({t.m[row], t.l[row]}, {from.m[row], from.l[row]});
    t.m[row] = merged.state.m;
    t.l[row] = merged.state.l;
    float* a = t.output + row * t.output_stride;
    const float* b = from.output + row * t.output_stride;
    for (int64_t i = 0; i < t.output_stride; ++i) a[i] = a[i] * merged.weight_a + b[i] * merged.weight_b;
  }
}

// A thread keeps this memory from call to call, so that decoding allocates nothing once warm.
class ScratchMemory {
 public:
  float* reserve(size_t floats) {
    if (floats > size_) {
      memory_.reset();
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};

// The state of one of the heads that a thread takes through a segment in one pass. `saved` is what it had
// summed before; see kSumTokens.
struct HeadState {
  int64_t kv_head;
  TileState tile;
  Partial saved;
};

class Workspace {
 public:
  // Room for output tiles of `kernel` and for those of fewer rows; `table` is null where caches have q's
  // dtype.
  Workspace(const DecodeParams& params, const TileKernel& kernel, const DequantiseTable* table,
            const Plan& plan)
      : p_(params),
        table_(table),
        rows_(plan.rows_per_block),
        padded_rows_(round_up(plan.rows_per_block, kernel.rows_at_once)),
        heads_(plan.heads_per_pass),
        partial_floats_(plan.partial_floats),
        padded_head_dim_(round_up(params.k.dims, kernel.chunk_columns)),
        padded_head_dim_v_(round_up(params.v.dims, kernel.chunk_columns)),
        dequantised_floats_(plan.dequantises
                                ? round_up(DequantisedRows::memory_floats(params, kernel), kCacheLineFloats)
                                : 0),
        scratch_floats_(
            kernel.scratch_bytes == nullptr
                ? 0
                : round_up(kernel.scratch_bytes(std::max(params.k.dims, params.v.dims)) / sizeof(float),
                           kCacheLineFloats)) {}

  // Makes room for `partials` partial states, the states of `shared_rows` rows, and for the threads. The
  // memory is the calling thread's, until its next call.
  void reserve(int64_t partials, int64_t shared_rows, int64_t threads) {
    static thread_local ScratchMemory memory;
    const int64_t shared_floats = round_up(shared_rows * (padded_head_dim_v_ + 2), kCacheLineFloats);
    partials_ = memory.reserve(partials * partial_floats_ + shared_floats + threads * thread_floats());
    shared_ = partials_ + partials * partial_floats_;
    threads_ = shared_ + shared_floats;
    shared_rows_ = shared_rows;
  }

  Partial partial(int64_t i) const { return partial_at(partials_ + i * partial_floats_); }

  // Those of the rows from `row` on.
  Partial shared_states(int64_t row) const {
    float* const m = shared_ + shared_rows_ * padded_head_dim_v_;
    return {shared_ + row * padded_head_dim_v_, m + row, m + shared_rows_ + row};
  }

  std::array<HeadState, kMaxHeadsPerPass> heads_of(int64_t thread) const {
    std::array<HeadState, kMaxHeadsPerPass> heads{};
    for (int64_t i = 0; i < heads_; ++i) {
      float* memory = threads_ + thread * thread_floats() + i * head_floats();
      float* const run_output = run_outputs(thread) + i * run_output_floats();
      heads[i] = {0, tile_state(memory + partial_floats_, run_output), partial_at(memory)};
      heads[i].tile.scratch = dequantised_rows(thread) + dequantised_floats_;
    }
    return heads;
  }

  // The memory of a thread's DequantisedRows.
  float* dequantised_rows(int64_t thread) const { return run_outputs(thread) + heads_ * run_output_floats(); }

 private:
  // A thread has the memory of its HeadStates, then their run_outputs, that of its DequantisedRows and the
  // kernel's scratch. The run_outputs of one pass's heads are written in turn, so they are neighbours: in L1
  // they do not push each other out.
  int64_t thread_floats() const {
    return heads_ * (head_floats() + run_output_floats()) + dequantised_floats_ + scratch_floats_;
  }
  float* run_outputs(int64_t thread) const {
    return threads_ + thread * thread_floats() + heads_ * head_floats();
  }
  int64_t run_output_floats() const { return std::min<int64_t>(rows_, kMaxRowsAdded) * padded_head_dim_v_; }

  Partial partial_at(float* output) const {
    float* m = output + rows_ * padded_head_dim_v_;
    return {output, m, m + rows_};
  }

  // A HeadState's memory holds the saved partial state, then what its TileState points to.
  int64_t head_floats() const {
    return partial_floats_ + padded_rows_ * (kMaxQueryCopies * padded_head_dim_ + padded_head_dim_v_) +
           4 * stats_floats() + kRunTokens * (rows_ + kMaxMicrokernelRows);
  }
  int64_t stats_floats() const { return round_up(rows_ + kMaxLanes, kCacheLineFloats); }
  TileState tile_state(float* memory, float* run_output) const {
    TileState t{};
    t.head_dim = static_cast<int>(p_.k.dims);
    t.head_dim_v = static_cast<int>(p_.v.dims);
    t.score = score_options(p_);
    t.output_stride = padded_head_dim_v_;
    t.table = table_;
    t.q = memory;
    t.output = memory + padded_rows_ * kMaxQueryCopies * padded_head_dim_;
    t.run_output = run_output;
    t.scores = t.output + padded_rows_ * padded_head_dim_v_;
    t.m = t.scores + kRunTokens * (rows_ + kMaxMicrokernelRows);
    t.l = t.m + stats_floats();
    t.run_max = t.l + stats_floats();
    // Kernels read the padding rows' numbers, without using what comes of them.
    std::fill_n(t.m, 3 * stats_floats(), 0.0f);
    if (p_.alibi_slopes != nullptr) t.slopes = t.run_max + stats_floats();
    return t;
  }

  const DecodeParams& p_;
  const DequantiseTable* const table_;
  const int64_t rows_;         // of an output tile, at most
  const int64_t padded_rows_;  // that there is room for
  const int64_t heads_;        // of a pass, at most
  const int64_t partial_floats_;
  const int64_t padded_head_dim_;
  const int64_t padded_head_dim_v_;
  const int64_t dequantised_floats_;
  const int64_t scratch_floats_;
  float* partials_ = nullptr;
  float* shared_ = nullptr;  // O of all rows, then their m and l
  int64_t shared_rows_ = 0;
  float* threads_ = nullptr;  // they come after the states
};

}  // namespace lean::cpu
