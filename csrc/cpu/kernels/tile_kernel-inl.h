// The tile kernel, once for all instruction sets: it takes the packed query rows of an output tile, a
// microkernel's rows at a time, over a run of tokens. Included by one source file per instruction set, inside
// its namespace and after a `Simd` with the vector operations, so that no two of them share a symbol.

#include "cpu/kernels/microkernel-inl.h"

#include "cpu/kernels/scores-inl.h"
#include "cpu/kernels/weighted_sum-inl.h"

template <class T, class KvRows, int rows>
struct Microkernel : Scores<T, KvRows, rows>, WeightedSum<T, KvRows, rows> {};

template <class T, class KvRows = Fp32Rows<T>>
struct TileKernelFor {
  using S = Simd;
  static int64_t query_stride(int64_t head_dim) { return Microkernel<T, KvRows, 1>::query_stride(head_dim); }

  // The microkernel that has a row: its first row and how many it has. Rows are spread evenly.
  struct MicrokernelRows {
    int first;
    int count;
  };
  static int microkernels_of(int rows) { return ceil_div(rows, S::kMicrokernelRows); }
  static MicrokernelRows rows_of_microkernel(int rows, int row) {
    const int microkernels = microkernels_of(rows);
    const int count = rows / microkernels, longer = rows % microkernels, in_longer = longer * (count + 1);
    if (row < in_longer) return {row / (count + 1) * (count + 1), count + 1};
    return {in_longer + (row - in_longer) / count * count, count};
  }

  // Calls `take` with the Microkernel that has `count` rows.
  template <int rows = S::kMicrokernelRows, class Take>
  LEAN_INLINE static void with_microkernel(int count, const Take& take) {
    if (count == rows) return take(Microkernel<T, KvRows, rows>{});
    if constexpr (rows > 1) with_microkernel<rows - 1>(count, take);
  }

  static void pack_query(const TileState& t, int row, const void* q) {
    const MicrokernelRows rows = rows_of_microkernel(t.rows, row);
    auto* const packed = static_cast<typename KvRows::Query*>(t.q) + rows.first * query_stride(t.head_dim);
    with_microkernel(rows.count, [&](auto microkernel) {
      microkernel.pack_query(packed, row - rows.first, static_cast<const typename KvRows::Tensor*>(q),
                             t.head_dim);
    });
  }

  // What is prefetched while a run with these rows is multiplied: the same rows again if there is nothing to
  // prefetch, so that loops need no branch.
  static Prefetch some_prefetch(const Prefetch& prefetch, const void* const* rows, int columns) {
    return prefetch.count > 0 ? prefetch : Prefetch{rows, kRunTokens, columns * static_cast<int>(sizeof(T))};
  }

  // Part `i` of `parts` of a prefetch whose window is as many bytes as rows of `bytes` each have in `run`.
  static Prefetch part_of(const Prefetch& prefetch, const Rows& run, int bytes, int i, int parts) {
    const int window = run.tokens * bytes;
    // Rows of several heads are given as one, and what is prefetched along with a head begins anywhere.
    const bool divisible = prefetch.count == 1 || (prefetch.begin == 0 && prefetch.bytes == bytes);
    if (parts == 1 || !divisible || window < parts * kLine) return i == 0 ? prefetch : Prefetch{};
    Prefetch part = prefetch;
    if (prefetch.count == 1) {
      part.begin += window / parts * i;
      part.bytes =
          std::min(prefetch.bytes, prefetch.begin + (i + 1 < parts ? window / parts * (i + 1) : window));
      if (part.begin >= part.bytes) return {};
    } else {
      part.rows += prefetch.count * i / parts;
      part.count = prefetch.count * (i + 1) / parts - prefetch.count * i / parts;
    }
    return part;
  }

  // Calls `take` with each microkernel, its first row, its scores and what to prefetch meanwhile: each takes
  // a part, since all at once would take longer than one of them.
  template <class Take>
  LEAN_INLINE static void for_each_microkernel(const TileState& t, const Rows& run, int columns,
                                               const Prefetch& prefetch, const Take& take) {
    float* scores = t.scores;
    const int microkernels = microkernels_of(t.rows);
    for (int row = 0, i = 0; row < t.rows; ++i, scores += S::kMicrokernelRows * kRunTokens) {
      const int count = rows_of_microkernel(t.rows, row).count;
      const Prefetch part = part_of(prefetch, run, columns * static_cast<int>(sizeof(T)), i, microkernels);
      const Prefetch its_prefetch = some_prefetch(part, run.row, columns);
      with_microkernel(count, [&](auto microkernel) { take(microkernel, row, scores, its_prefetch); });
      row += count;
    }
  }
  static void score(const TileState& t, const Rows& run, const RowView* views, const Prefetch& prefetch) {
    for_each_microkernel(t, run, t.head_dim, prefetch,
                         [&](auto microkernel, int row, float* scores, const Prefetch& its_prefetch) {
                           microkernel.score(t, row, scores, run, views, its_prefetch);
                         });
  }
  // The most rows of a head that score_heads takes.
  template <int rows = S::kMicrokernelRows>
  static constexpr int max_rows_for_heads() {
    if constexpr (rows == 0) {
      return 0;
    } else if constexpr (Microkernel<T, KvRows, rows>::kWholeRows) {
      return rows;
    } else {
      return max_rows_for_heads<rows - 1>();
    }
  }
  static void score_heads(const TileState* const* heads, int count, const Rows& run, const RowView* views,
                          const Prefetch& prefetch) {
    if constexpr (max_rows_for_heads() > 0) {
      with_microkernel<max_rows_for_heads()>(heads[0]->rows, [&](auto microkernel) {
        microkernel.score_heads(heads, count, run, views,
                                some_prefetch(prefetch, run.row, heads[0]->head_dim));
      });
    }
  }
  static void accumulate(const TileState& t, const Rows& run, const Prefetch& prefetch) {
    for_each_microkernel(t, run, t.head_dim_v, prefetch,
                         [&](auto microkernel, int row, float* scores, const Prefetch& its_prefetch) {
                           microkernel.accumulate(t, row, scores, run, its_prefetch);
                         });
  }

  static void accumulate_heads(const TileState* const* heads, int count, const Rows& run,
                               const Prefetch& prefetch) {
    constexpr int max_rows = std::min(max_rows_for_heads(), kMaxRowsAdded);
    if constexpr (max_rows > 0) {
      with_microkernel<max_rows>(heads[0]->rows, [&](auto microkernel) {
        microkernel.accumulate_heads(heads, count, run,
                                     some_prefetch(prefetch, run.row, heads[0]->head_dim_v));
      });
    }
  }

  static void write_output(const TileState& t, int row, float row_factor, void* out) {
    const S::F factor = S::set1(row_factor);
    const float* from = t.output + row * t.output_stride;
    auto* to = static_cast<typename KvRows::Tensor*>(out);
    for (int column = 0; column < t.head_dim_v; column += KvRows::kColumns) {
      const int columns = t.head_dim_v - column;
      KvRows::store_output(to + column, columns < KvRows::kColumns ? columns : KvRows::kColumns,
                           S::mul(S::load(from + column), factor),
                           S::mul(S::load(from + column + S::kLanes), factor));
    }
  }

  static void dequantise(DType from, const DequantiseTable& table, const void* const* rows, int count,
                         int columns, void* to, const Prefetch& prefetch) {
    const Simd::Dequantiser<T> dequantiser(from, table);
    for (int i = 0; i < count; ++i) {
      if (i < prefetch.count) prefetch_bytes<2>(prefetch.rows[i], prefetch.bytes);
      dequantiser(static_cast<const uint8_t*>(rows[i]), columns, static_cast<T*>(to) + i * columns);
    }
  }

  static int64_t fma_loop(int64_t rounds) {
    constexpr int kSums = 2 * S::kMicrokernelRows < 8 ? 8 : 2 * S::kMicrokernelRows;
    alignas(64) char bytes[256] = {};
    const void* zeros = bytes;
    asm("" : "+r"(zeros) : : "memory");  // the compiler is not to know that they are zero
    const auto q = KvRows::load_query(static_cast<const typename KvRows::Query*>(zeros));
    typename KvRows::Chunk k;
    memcpy(&k, zeros, sizeof k);
    S::F sums[kSums];
    for (auto& sum : sums) {
      asm("" : "+r"(zeros));  // nor that the sums are equal
      sum = S::load(static_cast<const float*>(zeros));
    }
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
      for (auto& sum : sums) sum = KvRows::dot(sum, k, q);
    }
    for (auto& sum : sums) {
      S::store(reinterpret_cast<float*>(bytes), sum);
      asm("" : : "r"(&bytes) : "memory");
    }
    return rounds * kSums * 2 * KvRows::kDotColumns;  // of two tokens' rows
  }

  // The kernel for caches of T, and for quantised ones whose rows are converted to it.
  static constexpr TileKernel kernel(const char* instruction_set) {
    TileKernel r = kernel_as_is(instruction_set);
    r.dequantise = dequantise;
    return r;
  }
  // The kernel for rows that need no conversion beforehand.
  static constexpr TileKernel kernel_as_is(const char* instruction_set) {
    return {.instruction_set = instruction_set,
            .row_dtype = KvRows::kRowDtype,
            .chunk_columns = KvRows::kColumns,
            .column_order = KvRows::kColumnOrder,
            .max_rows_for_heads = max_rows_for_heads(),
            .pack_query = pack_query,
            .score = score,
            .score_heads = score_heads,
            .accumulate = accumulate,
            .accumulate_heads = accumulate_heads,
            .write_output = write_output,
            .dequantise = nullptr,
            .fma_loop = fma_loop};
  }
};
