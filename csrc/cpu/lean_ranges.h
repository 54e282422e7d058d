// The lean ranges of a call, and how a thread takes them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "schedule.h"

namespace lean::cpu {

// The ranges of a call, which are handed out from the last to the first.
class LeanRanges {
 public:
  LeanRanges() = default;

  // Ranges as the schedule has them, one per CTA.
  static LeanRanges equal(const Grid& grid) {
    LeanRanges ranges;
    for (int64_t cta = 0; cta < grid.num_ctas; ++cta) ranges.begins_.push_back(grid.range(cta).end);
    return ranges;
  }

  // Ranges for threads that need not be equally fast: their cores may differ, or share their time with other
  // programs. Each range is half of a thread's share of what is left, so that few are long and the threads
  // end together (guided self-scheduling; Polychronopoulos and Kuck, 1987), but at least `least` LeanTiles,
  // half of that the very last. Ranges are equal where that would leave threads without any.
  static LeanRanges guided(int64_t total_tiles, int64_t threads, int64_t least) {
    if (threads == 1 || total_tiles < 2 * threads * least) return equal({threads, total_tiles});
    LeanRanges ranges;
    ranges.begins_ = {total_tiles};
    for (int64_t left = total_tiles; left > 0;) {
      const int64_t tiles = std::max(least, left / (2 * threads));
      left = 2 * (left - tiles) < least ? 0 : left - tiles;
      ranges.begins_.push_back(left);
    }
    std::reverse(ranges.begins_.begin(), ranges.begins_.end());
    return ranges;
  }

  int64_t count() const { return static_cast<int64_t>(begins_.size()) - 1; }
  int64_t total_tiles() const { return begins_.back(); }
  LeanRange range(int64_t cta) const { return {begins_[cta], begins_[cta + 1]}; }
  // The range that holds a LeanTile.
  int64_t cta_of(int64_t tile) const {
    return std::upper_bound(begins_.begin(), begins_.end(), tile) - begins_.begin() - 1;
  }

 private:
  std::vector<int64_t> begins_{0};  // ascending, then one past the last LeanTile
};

// A segment that a thread has taken; its `batch` is the sequence of the batch that has its tokens, `sequence`
// that of the schedule. The number is its range's or, of a fixed split, its own.
struct TakenSegment {
  Segment segment;
  int64_t number;
  int64_t sequence;
};

// Hands a thread its segments, one after another. The thread may look at the next before it is done with one,
// to prefetch what that reads; then the next is its own.
template <class Take>
class SegmentQueue {
 public:
  // `take(TakenSegment&)` takes another; false if none is left.
  explicit SegmentQueue(Take take) : take_(std::move(take)) {}

  // Moves to the first segment, then from each to the next; false at the end.
  bool advance() {
    look_ahead();
    looked_ = false;
    now_ = next_;
    return more_;
  }
  const TakenSegment& now() const { return now_; }
  // The segment after the current one; null if none is left.
  const TakenSegment* next() {
    look_ahead();
    return more_ ? &next_ : nullptr;
  }

 private:
  void look_ahead() {
    if (!looked_) more_ = take_(next_);
    looked_ = true;
  }

  Take take_;
  TakenSegment now_{};
  TakenSegment next_{};
  bool looked_ = false;
  bool more_ = false;
};

}  // namespace lean::cpu
