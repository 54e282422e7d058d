// A microkernel: some query rows, whose accumulators stay in registers while a run of tokens passes them.
// This file has its shape; scores-inl.h and weighted_sum-inl.h, included after it, what it does. Included by
// tile_kernel-inl.h, once per instruction set.
//
// Scores are kept token-major: lane i of a vector is row i % period of token i / period, where the period is
// the microkernel's row count rounded up to a power of two. So the sums of a block of dot products reduce to
// whole vectors, softmax works on whole vectors, and the weights of a token are adjacent for the weighted
// sum.

#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/rows_fp32-inl.h"
#include "cpu/kernels/simd/math-inl.h"

constexpr int power_of_two_from(int n) {
  return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2);
}

template <class T, class KvRows, int rows>
struct MicrokernelShape {
  using S = Simd;
  using F = S::F;
  static constexpr int kPeriod = power_of_two_from(rows);
  static constexpr int kBlockTokens = S::kLanes / kPeriod;  // tokens of one score vector
  // Vectors are handled in even number, because some KvRows pair tokens.
  static constexpr int kRoundTokens = 2 * kBlockTokens;
  static_assert(kRunTokens % kRoundTokens == 0);
  // The microkernel has so few products to a row of K or V that memory is far from keeping up. Then what
  // counts is to read in the order of addresses.
  static constexpr bool kFewRows = rows * (KvRows::kConverts ? 4 : 2) <= S::kMicrokernelRows;
  // The loops take one of these as a type, so that where they prefetch into is a constant to them: a branch
  // at each line costs 3 to 15 % in cache. Where rows are not converted, prefetches wait for what is being
  // multiplied. The cores that prefetch into L1 have AVX-512 with bf16 instructions: kernels that are for
  // others have one type, and half as much to compile.
  static constexpr bool kHasIntoL1 = S::kHasIntoL1 && !std::is_same_v<KvRows, Fp32Rows<BFloat16>>;
  using IntoL1 = PrefetcherInto<kHasIntoL1 ? 1 : 2, !KvRows::kConverts>;
  using IntoL2 = PrefetcherInto<2, !KvRows::kConverts>;

  // K is multiplied row by row. Rows are read so in the order of addresses, but have more sums to reduce.
  static constexpr bool kWholeRows = kFewRows && KvRows::kReadsWholeRows;

  // Goes through a row's columns: calls `take(chunks, column, load)` for up to `most` chunks at a time, the
  // first of them at `column`, each to be loaded with `load`.
  template <int most, class Take>
  LEAN_INLINE static void in_steps(int head_dim, const Take& take) {
    int column = 0;
    const auto take_whole = [&](auto chunks) LEAN_INLINE {
      for (; column + chunks * KvRows::kColumns <= head_dim; column += chunks * KvRows::kColumns) {
        take(chunks, column, [](const T* from) LEAN_INLINE { return KvRows::load(from); });
      }
    };
    if constexpr (most >= 4) take_whole(std::integral_constant<int, 4>{});
    if constexpr (most >= 2) take_whole(std::integral_constant<int, 2>{});
    take_whole(std::integral_constant<int, 1>{});
    if (const int tail = head_dim - column; tail > 0) {
      take(std::integral_constant<int, 1>{}, column,
           [&](const T* from) LEAN_INLINE { return KvRows::load_tail(from, tail); });
    }
  }

  // Calls `take` with each chunk of a row and its first column.
  template <class Prefetcher, class Take>
  LEAN_INLINE static void for_each_chunk(const T* row, int head_dim, Prefetcher& prefetcher,
                                         const Take& take) {
    in_steps<4>(head_dim, [&](auto chunks, int first, auto load) LEAN_INLINE {
      prefetcher.template issue<chunks * KvRows::kColumns * sizeof(T)>(first / KvRows::kColumns, 0, 1,
                                                                       row + first);
      unrolled<chunks>([&](auto c) LEAN_INLINE {
        const int column = first + c * KvRows::kColumns;
        take(column, load(row + column));
      });
    });
  }

  static int padded_tokens(const Rows& run) {
    return (run.tokens + kRoundTokens - 1) / kRoundTokens * kRoundTokens;
  }
};
