// The tile routine, once for all instruction sets: the packed query rows of an output tile, strip by strip,
// over a run of tokens. Included by one source file per instruction set, inside its namespace and after a
// `Simd` with the vector operations, so that no two of them share a symbol.

#include "cpu/tiles/strip.h"

#include "cpu/tiles/keys.h"
#include "cpu/tiles/values.h"

template <class T, class Format, int rows>
struct Strip : KeyStrip<T, Format, rows>, ValueStrip<T, Format, rows> {};

template <class T, class Format = Fp32Format<T>>
struct Tile {
  using S = Simd;
  static int64_t query_stride(int64_t head_dim) { return Strip<T, Format, 1>::query_stride(head_dim); }

  // The strip of a row: its first row and how many it has. Rows are spread evenly.
  struct StripRows {
    int first;
    int count;
  };
  static StripRows strip_of(int rows, int row) {
    const int strips = (rows + S::kStripRows - 1) / S::kStripRows;
    const int count = rows / strips, longer = rows % strips, in_longer = longer * (count + 1);
    if (row < in_longer) return {row / (count + 1) * (count + 1), count + 1};
    return {in_longer + (row - in_longer) / count * count, count};
  }

  // Calls `take` with the Strip of `count` rows.
  template <int rows = S::kStripRows, class Take>
  LEAN_INLINE static void with_strip(int count, const Take& take) {
    if (count == rows) return take(Strip<T, Format, rows>{});
    if constexpr (rows > 1) with_strip<rows - 1>(count, take);
  }

  static void pack_query(const TileState& t, int row, const void* q) {
    const StripRows rows = strip_of(t.rows, row);
    auto* const packed = static_cast<typename Format::Query*>(t.q) + rows.first * query_stride(t.head_dim);
    with_strip(rows.count, [&](auto strip) {
      strip.pack_query(packed, row - rows.first, static_cast<const typename Format::Tensor*>(q), t.head_dim);
    });
  }

  // What to prefetch while a run is multiplied, whose rows these are: the same again if nothing is ahead.
  static RowsAhead some_ahead(const RowsAhead& ahead, const void* const* rows, int columns) {
    return ahead.count > 0 ? ahead : RowsAhead{rows, kRunTokens, columns * static_cast<int>(sizeof(T))};
  }

  // Calls `take` with each strip, its first row, its scores and what to prefetch meanwhile: one strip's
  // prefetches serve them all. `rows` are those of the run.
  template <class Take>
  LEAN_INLINE static void for_each_strip(const TileState& t, const void* const* rows, int columns,
                                         const RowsAhead& ahead, const Take& take) {
    float* scores = t.scores;
    for (int row = 0; row < t.rows; scores += S::kStripRows * kRunTokens) {
      const int count = strip_of(t.rows, row).count;
      const RowsAhead next = some_ahead(row == 0 ? ahead : RowsAhead{}, rows, columns);
      with_strip(count, [&](auto strip) { take(strip, row, scores, next); });
      row += count;
    }
  }
  static void score(const TileState& t, const Run& run, const RowView* views, const RowsAhead& ahead,
                    const void* next_q) {
    // Otherwise its lines would wait for places among the many that are on their way from memory.
    if (next_q != nullptr) {
      prefetch<1>(next_q, t.rows * query_stride(t.head_dim) * sizeof(typename Format::Query));
    }
    for_each_strip(t, run.k_rows, t.head_dim, ahead,
                   [&](auto strip, int row, float* scores, const RowsAhead& rows_ahead) {
                     strip.score(t, row, scores, run, views, rows_ahead);
                   });
  }
  // Up to how many rows a tile may have for score_abreast.
  template <int rows = S::kStripRows>
  static constexpr int max_rows_abreast() {
    if constexpr (rows == 0) {
      return 0;
    } else if constexpr (Strip<T, Format, rows>::kWholeRows) {
      return rows;
    } else {
      return max_rows_abreast<rows - 1>();
    }
  }
  static void score_abreast(const TileState* const* tiles, int heads, const Run& run, const RowView* views,
                            const RowsAhead& ahead) {
    if constexpr (max_rows_abreast() > 0) {
      with_strip<max_rows_abreast()>(tiles[0]->rows, [&](auto strip) {
        strip.score_abreast(tiles, heads, run, views, some_ahead(ahead, run.k_rows, tiles[0]->head_dim));
      });
    }
  }
  static void accumulate(const TileState& t, const Run& run, const RowsAhead& ahead) {
    for_each_strip(t, run.v_rows, t.head_dim_v, ahead,
                   [&](auto strip, int row, float* scores, const RowsAhead& rows_ahead) {
                     strip.accumulate(t, row, scores, run, rows_ahead);
                   });
  }

  static void accumulate_abreast(const TileState* const* tiles, int heads, const Run& run,
                                 const RowsAhead& ahead) {
    constexpr int max_rows = std::min(max_rows_abreast(), kMaxRowsAdded);
    if constexpr (max_rows > 0) {
      with_strip<max_rows>(tiles[0]->rows, [&](auto strip) {
        strip.accumulate_abreast(tiles, heads, run, some_ahead(ahead, run.v_rows, tiles[0]->head_dim_v));
      });
    }
  }

  static void write_output(const TileState& t, int row, float row_factor, void* out) {
    const S::F factor = S::set1(row_factor);
    const float* from = t.output + row * t.output_stride;
    auto* to = static_cast<typename Format::Tensor*>(out);
    for (int column = 0; column < t.head_dim_v; column += Format::kColumns) {
      const int columns = t.head_dim_v - column;
      Format::store_output(to + column, columns < Format::kColumns ? columns : Format::kColumns,
                           S::mul(S::load(from + column), factor),
                           S::mul(S::load(from + column + S::kLanes), factor));
    }
  }

  static void widen(DType from, const WideningTable& table, const void* const* rows, int count, int columns,
                    void* to, const RowsAhead& ahead) {
    const Simd::Widener<T> widener(from, table);
    for (int i = 0; i < count; ++i) {
      if (i < ahead.count) prefetch<2>(ahead.rows[i], ahead.bytes);
      widener(static_cast<const uint8_t*>(rows[i]), columns, static_cast<T*>(to) + i * columns);
    }
  }

  static int64_t multiply(int64_t rounds) {
    constexpr int kSums = 2 * S::kStripRows < 8 ? 8 : 2 * S::kStripRows;
    alignas(64) char bytes[256] = {};
    const void* zeros = bytes;
    asm("" : "+r"(zeros) : : "memory");  // the compiler is not to know that they are zero
    const auto q = Format::load_query(static_cast<const typename Format::Query*>(zeros));
    typename Format::Chunk k;
    memcpy(&k, zeros, sizeof k);
    S::F sums[kSums];
    for (auto& sum : sums) {
      asm("" : "+r"(zeros));  // nor that the sums are equal
      sum = S::load(static_cast<const float*>(zeros));
    }
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
      for (auto& sum : sums) sum = Format::dot(sum, k, q);
    }
    for (auto& sum : sums) {
      S::store(reinterpret_cast<float*>(bytes), sum);
      asm("" : : "r"(&bytes) : "memory");
    }
    return rounds * kSums * 2 * Format::kDotColumns;  // of two tokens' rows
  }

  // For caches of T, and for quantised ones whose rows are converted to it.
  static constexpr TileRoutine routine(const char* instruction_set) {
    TileRoutine r = routine_as_is(instruction_set);
    r.widen = widen;
    return r;
  }
  // For rows that need no conversion.
  static constexpr TileRoutine routine_as_is(const char* instruction_set) {
    return {instruction_set, Format::kRowDtype, Format::kColumns,   max_rows_abreast(), pack_query, score,
            score_abreast,   accumulate,        accumulate_abreast, write_output,       nullptr,    multiply};
  }
};
