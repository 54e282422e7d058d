// A strip of query rows, whose accumulators stay in registers while a run of tokens passes them: its shape.
// Included by tile_impl.h, once per instruction set, and after it keys.h and values.h: what a strip does.
//
// Scores of a strip are kept token-major: lane i of a vector is row i % period of token i / period, where
// the period is the strip's row count rounded up to a power of two. So the sums of a block of dot products
// reduce to whole vectors, softmax works on whole vectors, and the weights of a token are adjacent for the
// weighted sum.

#include "cpu/tiles/ahead.h"
#include "cpu/tiles/fp32_format.h"
#include "cpu/tiles/simd/vector_math.h"

constexpr int power_of_two_from(int n) {
  return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : 8;
}

template <class T, class Format, int rows>
struct StripShape {
  using S = Simd;
  using F = S::F;
  static constexpr int kPeriod = power_of_two_from(rows);
  static constexpr int kBlockTokens = S::kLanes / kPeriod;  // tokens of one score vector
  // Vectors are handled in even number, which is what Formats that pair tokens need.
  static constexpr int kRoundTokens = 2 * kBlockTokens;
  static_assert(kRunTokens % kRoundTokens == 0);
  static_assert(kRoundTokens % (Format::kTokensPerStep * Format::kStepsAtOnce) == 0);
  // Whether a strip has so few products to a row of K or V that memory is far from keeping up. Then what
  // counts is to read in the order of addresses.
  static constexpr bool kFewRows = rows * (Format::kConverts ? 4 : 2) <= S::kStripRows;
  // Whether prefetches wait for what is being multiplied.
  static constexpr bool kPaced = !Format::kConverts;

  // Whether K is multiplied row by row. Rows are read so in the order of addresses, but have more sums to
  // reduce.
  static constexpr bool kWholeRows = kFewRows && Format::kReadsWholeRows;

  // Goes through a row's columns: calls `take(chunks, column, load)` for up to `most` chunks at a time, the
  // first of them at `column`, each to be loaded with `load`.
  template <int most, class Take>
  LEAN_INLINE static void in_steps(int head_dim, const Take& take) {
    int column = 0;
    const auto take_whole = [&](auto chunks) LEAN_INLINE {
      for (; column + chunks * Format::kColumns <= head_dim; column += chunks * Format::kColumns) {
        take(chunks, column, [](const T* from) LEAN_INLINE { return Format::load(from); });
      }
    };
    if constexpr (most >= 4) take_whole(std::integral_constant<int, 4>{});
    if constexpr (most >= 2) take_whole(std::integral_constant<int, 2>{});
    take_whole(std::integral_constant<int, 1>{});
    if (const int tail = head_dim - column; tail > 0) {
      take(std::integral_constant<int, 1>{}, column,
           [&](const T* from) LEAN_INLINE { return Format::load_tail(from, tail); });
    }
  }

  // Calls `take` with each chunk of a row and its first column.
  template <int level, class Take>
  LEAN_INLINE static void for_each_chunk(const T* row, int head_dim, Ahead<kPaced, level>& ahead,
                                         const Take& take) {
    in_steps<4>(head_dim, [&](auto chunks, int first, auto load) LEAN_INLINE {
      ahead.template keep_up<chunks * Format::kColumns * sizeof(T)>(first / Format::kColumns, 0, 1,
                                                                    row + first);
      unrolled<chunks>([&](auto c) LEAN_INLINE {
        const int column = first + c * Format::kColumns;
        take(column, load(row + column));
      });
    });
  }

  static int padded_tokens(const Run& run) {
    return (run.tokens + kRoundTokens - 1) / kRoundTokens * kRoundTokens;
  }
};
