// Prefetches what is read next while other rows are multiplied. Included by microkernel-inl.h, once per
// instruction set.

constexpr int kLine = 64;  // bytes of a cache's line

// Prefetches these bytes into the cache of that level. (Always inline: a function that only prefetches counts
// as one without effect, and its calls are dropped.)
template <int level>
LEAN_INLINE inline void prefetch_bytes(const void* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, 4 - level);
  }
}

// Issues the prefetches of a Prefetch in the order of their addresses, which memory reads faster than any
// other. (Where rows are neither adjacent nor whole lines, some lines are left to the hardware.)
template <int level, bool paced>
class PrefetcherInto {
 public:
  // Begins `skip` bytes further on.
  explicit PrefetcherInto(const Prefetch& a, int skip)
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

  // Prefetches as many bytes as are loaded meanwhile: `bytes` of other rows in each step of a loop, the last
  // of them at `loaded`. It is called `count` times in a step, `i` counts, and spreads the prefetches over
  // these where there are registers for it: a burst finds fewer places free among the core's reads in flight.
  template <int bytes>
  LEAN_INLINE void issue(unsigned step, int i, int count, const void* loaded) {
    if constexpr (bytes >= kLine) {
      constexpr int kLines = bytes / kLine;
      const int parts = Simd::kLanes >= 16 ? count : 1;
      if (i >= parts) return;
#pragma GCC unroll 16
      for (int l = kLines * i / parts; l < kLines * (i + 1) / parts; ++l) {
        if (paced && l == 0) pace_by(loaded);
        prefetch_line();
      }
    } else {
      if (i != 0 || step % (kLine / bytes) != 0) return;
      if constexpr (paced) pace_by(loaded);
      prefetch_line();
    }
  }

 private:
  LEAN_INLINE void prefetch_line() {
    prefetch_bytes<level>(at_, kLine);
    at_ += kLine;
    if (at_ < end_) [[likely]]
      return;
    if (row_ != last_) row_ += rows_at_once_;
    const char* const row = static_cast<const char*>(*row_);
    if (line_of(row) != at_ - kLine) at_ = line_of(row);  // else the row begins in the line before
    end_ = row + bytes_at_once_;
  }

  // Paces: adds a 0 that is computed from the word at `loaded` to the address, so that no later prefetch can
  // issue before that word is loaded. A core that prefetches as fast as it can has more lines waiting than it
  // can have in flight, and takes them out of order then, so that no hardware prefetcher follows. (AMD's do;
  // unmeasured today.)
  LEAN_INLINE void pace_by(const void* loaded) {
    uint32_t word;
    memcpy(&word, loaded, sizeof word);
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
