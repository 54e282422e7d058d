// Prefetches: what is read next, asked for while other rows are multiplied. Included by strip.h, once per
// instruction set.

// Asks a cache for these bytes. (Always inline: a function that only prefetches is taken for one without
// effect and its calls are dropped.)
template <int level>
LEAN_INLINE inline void prefetch(const void* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, 4 - level);
  }
}

// RowsAhead, asked for in the order of their addresses, which memory reads faster than any other. (Where rows
// are neither adjacent nor whole lines, some lines are left to the hardware.)
template <bool paced, int level>
class Ahead {
 public:
  // From `skip` bytes further on.
  explicit Ahead(const RowsAhead& a, int skip)
      : rows_at_once_(a.bytes >= kLine ? 1 : (kLine + a.bytes - 1) / a.bytes),
        bytes_at_once_(rows_at_once_ * a.bytes) {
    int row = 0, offset = a.begin + skip;
    if (offset >= a.bytes) {  // a division saved where rows are one long row
      row = std::min(offset / a.bytes, a.count - 1);
      offset %= a.bytes;
    }
    row_ = a.rows + row;
    const int rest = a.count - 1 - row;
    last_ = row_ + (a.bytes >= kLine ? rest : rest - rest % static_cast<int>(rows_at_once_));
    const char* const first = static_cast<const char*>(*row_);
    at_ = line_of(first + offset);
    end_ = first + bytes_at_once_;
    asm("" : "+r"(zero_));  // the compiler is not to know that it is zero
  }

  // In step `step` of many that each take `bytes` of other rows, the last of these at `taken`, and at place
  // `i` of `count` in it, asks for as much. Spread over the step where there are registers for it: a burst
  // finds fewer places free among the core's reads in flight.
  template <int bytes>
  LEAN_INLINE void keep_up(unsigned step, int i, int count, const void* taken) {
    if constexpr (bytes >= kLine) {
      constexpr int kLines = bytes / kLine;
      const int parts = Simd::kLanes >= 16 ? count : 1;
      if (i >= parts) return;
#pragma GCC unroll 16
      for (int l = kLines * i / parts; l < kLines * (i + 1) / parts; ++l) {
        if (paced && l == 0) wait_for(taken);
        ask();
      }
    } else {
      if (i != 0 || step % (kLine / bytes) != 0) return;
      if constexpr (paced) wait_for(taken);
      ask();
    }
  }

 private:
  static constexpr int kLine = 64;

  LEAN_INLINE void ask() {
    prefetch<level>(at_, kLine);
    at_ += kLine;
    if (at_ < end_) [[likely]]
      return;
    if (row_ != last_) row_ += rows_at_once_;
    const char* const row = static_cast<const char*>(*row_);
    if (line_of(row) != at_ - kLine) at_ = line_of(row);  // else the row begins in the line just asked for
    end_ = row + bytes_at_once_;
  }

  // Makes what is asked for from now on wait until `taken` has arrived: a word of it, masked to zero, is
  // added to the address. A core that asks as fast as it can has more lines waiting than it can have in
  // flight, and takes them out of order then, so that no hardware prefetcher follows.
  LEAN_INLINE void wait_for(const void* taken) {
    uint32_t word;
    memcpy(&word, taken, sizeof word);
    at_ += word & zero_;
  }

  static const char* line_of(const char* address) {
    return address - reinterpret_cast<uintptr_t>(address) % kLine;
  }

  const char* at_;
  const char* end_;
  const void* const* row_;
  const void* const* last_;
  uint32_t zero_ = 0;
  const int64_t rows_at_once_;  // 1, but where rows are shorter than a line
  const int64_t bytes_at_once_;
};
