// K and V on their way to a warp: a ring of asynchronous copies. Items are panels in the order of use: the K
// panels of a step, then its V panels. All slots but one are under way.
#pragma once

#include <utility>

#include "cuda/decode/kv_source.h"

namespace lean::cuda {

template <class Config>
class KvRing {
  using KPanels = typename Config::KPanels;
  using VPanels = typename Config::VPanels;
  static constexpr int kAhead = Config::slots - 1;  // items

 public:
  static constexpr int kStride = Config::token_warps * kStepTokens;

  LEAN_DEVICE KvRing(const DecodeArguments& a, const Thread& thread)
      : a_(a),
        lane_(thread.lane),
        ring_(ring_of<Config>(thread.warp)),
        first_dim_v_(thread.warp % Config::dim_warps * Config::warp_dim_v) {}

  // Begins with the tokens of a segment, of which fill_steps and then fill_panels start the first copies.
  LEAN_DEVICE void begin(SegmentPlace& place, const Thread& thread) {
    place_ = &place;
    read_ = ring_;
    before_ = ring_ + kAhead * Config::slot_bytes;
    fill_ = first_step(thread);
    end_ = place.end;
    whole_end_ = fill_ < place.begin ? 0 : whole_end();
    if (fill_ < end_) source_.begin(a_, place, lane_, first_dim_v_, place.first_token + fill_);
  }

  // Starts the copies of the early steps, into slots where no output of the segment before lies; else those
  // of the others.
  LEAN_DEVICE void fill_steps(bool early) {
    const int end = early ? Config::early_steps : kAhead / Config::panels;
    LEAN_ROLLED
    for (int step = early ? 0 : Config::early_steps; step < end; ++step) {
      fill_panels(ring_ + step * Config::panels * Config::slot_bytes,
                  std::make_integer_sequence<int, Config::panels>());
    }
  }
  // And those of the panels for which there are slots after the last whole step.
  LEAN_DEVICE void fill_panels() {
    fill_panels(ring_ + kAhead / Config::panels * Config::panels * Config::slot_bytes,
                std::make_integer_sequence<int, kAhead % Config::panels>());
  }

  // The first token of the step whose items come next.
  LEAN_DEVICE int32_t first_token() const { return fill_ - kAhead / Config::panels * kStride; }
  LEAN_DEVICE bool has_step() const { return first_token() < end_; }

  // The same of the warp's first step. Tokens count from the segment's first step.
  static LEAN_DEVICE int32_t first_step(const Thread& thread) {
    return thread.warp / Config::dim_warps * kStepTokens;
  }

  // Waits for the next item, which is panel kPanel of its step, starts a copy into the slot of the item
  // before it, and returns where the next item lies.
  template <int kPanel>
  LEAN_DEVICE const char* next() {
    hw::wait_copies<kAhead - 1>();
    hw::sync_warp();  // all lanes' copies are there, and all lanes have read the item before
    fill<(kPanel + kAhead) % Config::panels>(before_);
    before_ = read_;
    read_ = read_ == ring_ + kAhead * Config::slot_bytes ? ring_ : read_ + Config::slot_bytes;
    return before_;
  }

 private:
  template <int... kPanels>
  LEAN_DEVICE void fill_panels(char* slot, std::integer_sequence<int, kPanels...>) {
    (fill<kPanels>(slot + kPanels * Config::slot_bytes), ...);
  }

  // Steps that begin before this one are whole.
  LEAN_DEVICE int32_t whole_end() const { return a_.whole_steps ? end_ - (kStepTokens - 1) : 0; }

  // Starts the copy of panel kPanel of the step at fill_.
  template <int kPanel>
  LEAN_DEVICE void fill(char* slot) {
    constexpr bool kValues = kPanel >= KPanels::count;
    if (fill_ < whole_end_) {
      if constexpr (kValues) {
        copy_whole<VPanels, kPanel - KPanels::count>(slot, source_.v, a_.v_token_bytes, a_.v_chunks,
                                                     first_dim_v_);
      } else {
        copy_whole<KPanels, kPanel>(slot, source_.k, a_.k_token_bytes, a_.k_chunks, 0);
      }
      if constexpr (Config::quantised && kPanel == 0) {
        hw::copy_word_async(slot + Config::scales_at + 4 * lane_, source_.scale);
      }
    } else if (fill_ < end_) {
      if constexpr (kValues) {
        copy_rows<Config>(a_, *place_, slot, true, fill_,
                          (kPanel - KPanels::count) * VPanels::dims + first_dim_v_);
      } else {
        copy_rows<Config>(a_, *place_, slot, false, fill_, kPanel * KPanels::dims);
      }
    }
    hw::commit_copies();  // empty groups too, so that waiting counts alike
    if constexpr (kPanel == Config::panels - 1) {
      fill_ += kStride;
      whole_end_ = whole_end();
      if (fill_ < end_) source_.advance(a_, *place_, lane_, first_dim_v_, place_->first_token + fill_);
    }
  }

  // `chunks` are those that the tensor's rows have.
  template <class Panels, int kPanel>
  LEAN_DEVICE void copy_whole(char* slot, const char* from, int32_t token_bytes, int32_t chunks,
                              int32_t first_dim) const {
    constexpr int kElements = 16 / sizeof(typename Config::Element);
    char* const to =
        slot + Panels::Rows::offset(lane_ / Panels::lanes_per_row, lane_ % Panels::lanes_per_row);
    const int32_t mine =
        chunks - lane_ % Panels::lanes_per_row - (Config::dim_warps > 1 ? first_dim / kElements : 0);
#pragma unroll
    for (int chunk = 0; chunk < Panels::chunk_copies; ++chunk) {
      constexpr int kFirst = kPanel * Panels::Rows::chunks;
      const int column = chunk * Panels::lanes_per_row;
      const bool valid = kFirst + column < mine;
#pragma unroll
      for (int row = 0; row < Panels::row_copies * Panels::rows_per_copy; row += Panels::rows_per_copy) {
        hw::copy_async(to + Panels::Rows::offset(row, column),
                       from + row * int64_t{token_bytes} + 16 * (kFirst + column), valid);
      }
    }
  }

  const DecodeArguments& a_;
  const int lane_;
  char* const ring_;
  const int32_t first_dim_v_;
  SegmentPlace* place_;
  char* read_;    // the next item
  char* before_;  // the one before it
  int32_t fill_;  // first token of the step that is being copied; it, end_ and whole_end_ count from the
                  // first step
  int32_t end_;
  int32_t whole_end_;
  WholeSteps<Config> source_;
};

}  // namespace lean::cuda
