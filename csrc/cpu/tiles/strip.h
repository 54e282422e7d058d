// A strip of query rows, whose accumulators stay in registers, over a run of tokens: scores, online softmax
// and weighted sum. Included by tile_impl.h, once per instruction set.
//
// Scores of a strip are kept token-major: lane i of a vector is row i % period of token i / period, where
// the period is the strip's row count rounded up to a power of two. So the sums of a block of dot products
// reduce to whole vectors, softmax works on whole vectors, and the weights of a token are adjacent for the
// weighted sum.

#include "cpu/tiles/ahead.h"
#include "cpu/tiles/fp32_format.h"
#include "cpu/tiles/vector_math.h"

// By how much scores, in units of log2, may exceed what they are taken relative to.
constexpr float kSlack = 8;

constexpr int power_of_two_from(int n) {
  return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : 8;
}

template <class T, class Format, int rows>
struct Strip {
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

  // Pairs of tokens whose dot products are summed at a time, so that they share loads of q. Few, where memory
  // is the bound: the fewer rows are read abreast, the closer they come to the order of addresses.
  static constexpr int kPairs = kBlockTokens / 2;  // of one score vector
  static constexpr int kPairsAtOnce = kFewRows || kPairs < 2 ? 2 : Format::kPairsAtOnce;

  // The dot products of kRoundTokens tokens, which are two vectors. `q` holds the strip's packed rows. Each
  // is summed in half a vector: an accumulator holds one row's sums for two neighbouring tokens, so that half
  // as many need reducing.
  template <int level>
  LEAN_INLINE static void dot_abreast(const Format& format, int head_dim, const typename Format::Query* q,
                                      const void* const* k_rows, Ahead<kPaced, level>& ahead, F (&dots)[2]) {
    constexpr int kColumns = Format::kDotColumns;
    F sums[2][S::kLanes / 2];
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) sums[i % 2][i / 2] = S::zero();
#pragma GCC unroll 16
    for (int first = 0; first < 2 * kPairs; first += kPairsAtOnce) {
      const void* const* group = k_rows + 2 * first;
      const typename Format::Query* q_chunk = q;
      auto add_chunk = [&](size_t column, auto load) LEAN_INLINE {
        const auto at = [&](int token) { return static_cast<const T*>(group[token]) + column; };
        typename Format::Chunk k[kPairsAtOnce];
#pragma GCC unroll 16
        for (int i = 0; i < kPairsAtOnce; ++i) k[i] = load(at(2 * i), at(2 * i + 1));
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r, q_chunk += S::kQueryCopies * kColumns) {
          ahead.template keep_up<2 * kPairsAtOnce * kColumns * sizeof(T)>(
              static_cast<unsigned>(column) / kColumns, r, rows, at(2 * kPairsAtOnce - 1));
          const auto chunk = Format::load_query(q_chunk);
#pragma GCC unroll 16
          for (int i = 0; i < kPairsAtOnce; ++i) {
            F& sum = sums[(first + i) / kPairs][(first + i) % kPairs * kPeriod + r];
            sum = Format::dot(sum, k[i], chunk);
          }
        }
      };
      const size_t whole = head_dim / kColumns * kColumns;
      for (size_t column = 0; column < whole; column += kColumns) {
        add_chunk(column, [&](const T* a, const T* b) { return format.load_two(a, b); });
      }
      if (const int tail = head_dim - static_cast<int>(whole); tail > 0) {
        add_chunk(whole, [&](const T* a, const T* b) { return format.load_two_tail(a, b, tail); });
      }
    }
    dots[0] = S::interleave_halves<kPeriod>(S::sum_halves(sums[0]));
    dots[1] = S::interleave_halves<kPeriod>(S::sum_halves(sums[1]));
  }

  // Adds up the elements of each sum: a vector of them, token-major.
  LEAN_INLINE static F reduce(const F (&sums)[kBlockTokens][rows]) {
    F halves[S::kLanes / 2];
    unrolled<S::kLanes / 2>([&](auto i) LEAN_INLINE { halves[i] = S::zero(); });
    unrolled<kPairs>([&](auto pair) LEAN_INLINE {
      unrolled<rows>([&](auto r) LEAN_INLINE {
        halves[pair * kPeriod + r] = S::join_sums(sums[2 * pair][r], sums[2 * pair + 1][r]);
      });
    });
    return S::interleave_halves<kPeriod>(S::sum_halves(halves));
  }

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

  // The dot products of kRoundTokens tokens, row by row.
  template <int level>
  LEAN_INLINE static void dot_whole(const Format& format, int head_dim, const typename Format::Query* q,
                                    const void* const* k_rows, Ahead<kPaced, level>& ahead, F (&dots)[2]) {
    // So many chunks of each query row that all fit into registers beside the sums.
    constexpr int kQueryVectors = S::kLanes / 2;
    constexpr int kChunkVectors = sizeof(typename Format::Chunk) / sizeof(F);
    constexpr int kChunks = std::min(4, kQueryVectors / kPeriod) / kChunkVectors;
    static_assert(kChunks >= 1);
    unrolled<2>([&](auto block) LEAN_INLINE {
      const void* const* const group = k_rows + block * kBlockTokens;
      F sums[kBlockTokens][rows];
      unrolled<kBlockTokens>([&](auto token) LEAN_INLINE {
        unrolled<rows>([&](auto r) LEAN_INLINE { sums[token][r] = S::zero(); });
      });
      in_steps<kChunks>(head_dim, [&](auto chunks, int column, auto load) LEAN_INLINE {
        typename Format::Chunk q_chunks[rows][chunks];
        unrolled<rows>([&](auto r) LEAN_INLINE {
          unrolled<chunks>([&](auto c) LEAN_INLINE {
            q_chunks[r][c] =
                Format::load_shared_query(q + (column + c * Format::kColumns) * rows + r * Format::kColumns);
          });
        });
        unrolled<kBlockTokens>([&](auto token) LEAN_INLINE {
          const T* const row = static_cast<const T*>(group[token]) + column;
          ahead.template keep_up<chunks * Format::kColumns * sizeof(T)>(token, 0, 1, row);
          unrolled<chunks>([&](auto c) LEAN_INLINE {
            const typename Format::Chunk k = load(row + c * Format::kColumns);
            unrolled<rows>(
                [&](auto r) LEAN_INLINE { sums[token][r] = Format::dot(sums[token][r], k, q_chunks[r][c]); });
          });
        });
      });
      dots[block] = reduce(sums);
    });
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

  // Writes the dot products of several heads' rows with a run of whole vectors of tokens: token by token with
  // all heads of each, which is the order of addresses where a token's rows are neighbours.
  template <int level>
  __attribute__((noinline)) static void multiply_keys_abreast(const TileState* const* tiles, int heads,
                                                              const Run& run, const RowsAhead& rows_ahead) {
    const int head_dim = tiles[0]->head_dim;
    Ahead<kPaced, level> ahead(rows_ahead, 0);
    const T* row = static_cast<const T*>(run.k_rows[0]);
    for (int token = 0, head = 0; token < run.tokens;) {
      // As many pairs of a token and a head as there are tokens in a vector of one head's scores.
      F sums[kBlockTokens][rows];
      float* scores[kBlockTokens];
      unrolled<kBlockTokens>([&](auto i) LEAN_INLINE {
        const auto* const q = static_cast<const typename Format::Query*>(tiles[head]->q);
        scores[i] = tiles[head]->scores + token * kPeriod;
        unrolled<rows>([&](auto r) LEAN_INLINE { sums[i][r] = S::zero(); });
        for_each_chunk<level>(row, head_dim, ahead, [&](int column, typename Format::Chunk k) LEAN_INLINE {
          unrolled<rows>([&](auto r) LEAN_INLINE {
            const auto* const q_chunk = q + column * rows + r * Format::kColumns;
            sums[i][r] = Format::dot(sums[i][r], k, Format::load_whole_query(q_chunk));
          });
        });
        row += head_dim;
        if (++head == heads) {
          head = 0;
          if (++token < run.tokens) row = static_cast<const T*>(run.k_rows[token]);
        }
      });
      alignas(64) float dots[S::kLanes];
      S::store(dots, reduce(sums));
      unrolled<kBlockTokens>(
          [&](auto i) LEAN_INLINE { memcpy(scores[i], dots + i * kPeriod, kPeriod * sizeof(float)); });
    }
  }

  static int padded_tokens(const Run& run) {
    return (run.tokens + kRoundTokens - 1) / kRoundTokens * kRoundTokens;
  }

  // Writes the scaled dot products of the run's tokens, and of some after them, and returns their maximum per
  // row. Not inlined, nor are the loops over V: what the callers keep in registers would push the sums out of
  // them.
  template <int level>
  __attribute__((noinline)) static F multiply_keys(const TileState& t, int first_row, float* dots,
                                                   const Run& run, int tokens, const RowsAhead& rows_ahead) {
    // Copies, because for all the compiler knows storing a score changes what lies behind t.
    const Format format(t);
    const int head_dim = t.head_dim;
    const F scale = S::set1(t.scale);
    const auto* q = static_cast<const typename Format::Query*>(t.q) + first_row * query_stride(head_dim);
    Ahead<kPaced, level> ahead(rows_ahead, 0);
    F m = S::set1(kMinusInfinity);
    for (int token = 0; token < tokens; token += kRoundTokens) {
      F x[2];
      if constexpr (kWholeRows) {
        dot_whole(format, head_dim, q, run.k_rows + token, ahead, x);
      } else {
        dot_abreast(format, head_dim, q, run.k_rows + token, ahead, x);
      }
      unrolled<2>([&](auto i) LEAN_INLINE {
        const F s = S::mul(x[i], scale);
        S::store(dots + (token + i * kBlockTokens) * kPeriod, s);
        m = S::max(s, m);  // m where s is NaN
      });
    }
    return m;
  }

  // Writes the scores of the run's tokens, and of some after them, and their maximum per row.
  static void score(const TileState& t, int first_row, float* scores, const Run& run, const RowView* views,
                    const RowsAhead& rows_ahead) {
    const int tokens = padded_tokens(run);
    const auto multiply = rows_ahead.cache_level == 1 ? multiply_keys<1> : multiply_keys<2>;
    finish_run(t, first_row, scores, run, tokens, views,
               multiply(t, first_row, scores, run, tokens, rows_ahead));
  }

  // The same for several heads' rows and a run of whole vectors of tokens.
  static void score_abreast(const TileState* const* tiles, int heads, const Run& run, const RowView* views,
                            const RowsAhead& rows_ahead) {
    const auto multiply = rows_ahead.cache_level == 1 ? multiply_keys_abreast<1> : multiply_keys_abreast<2>;
    multiply(tiles, heads, run, rows_ahead);
    for (int head = 0; head < heads; ++head) {
      const TileState& t = *tiles[head];
      const F scale = S::set1(t.scale);
      F m = S::set1(kMinusInfinity);
      for (int i = 0; i < run.tokens * kPeriod; i += S::kLanes) {
        const F s = S::mul(S::load(t.scores + i), scale);
        S::store(t.scores + i, s);
        m = S::max(s, m);  // m where s is NaN
      }
      finish_run(t, 0, t.scores, run, run.tokens, views, m);
    }
  }

  // Makes scores of scaled dot products, whose maximum is `m`, and notes the maximum per row.
  static void finish_run(const TileState& t, int first_row, float* scores, const Run& run, int tokens,
                         const RowView* views, F m) {
    if (views != nullptr || tokens != run.tokens || t.softcap != 0.0f || run.k_scales != nullptr) {
      m = finish_scores(t, first_row, scores, run, tokens, views);
    }
    S::store(t.run_max + first_row, S::fold<kPeriod, S::max>(m));
  }

  // Makes scores of scaled dot products, where that takes more. Returns their maximum per row.
  static F finish_scores(const TileState& t, int first_row, float* scores, const Run& run, int tokens,
                         const RowView* views) {
    const F softcap = S::set1(t.softcap);
    const bool masked = views != nullptr || tokens != run.tokens, capped = t.softcap != 0.0f;
    const float* const k_scales = run.k_scales;
    LaneViews lanes{};
    if (masked) lanes = lane_views(t, first_row, run, views);
    F m = S::set1(kMinusInfinity);
    for (int token = 0; token < tokens; token += kBlockTokens) {
      F s = S::load(scores + token * kPeriod);
      if (k_scales != nullptr) s = S::mul(s, S::spread<kPeriod>(k_scales + token));
      if (capped) s = S::mul(tanh(s), softcap);
      if (masked) {
        const F distance = S::abs(S::sub(lanes.position, lanes.index));
        s = S::fma(lanes.minus_slope, distance, s);
        s = S::where_between(lanes.index, lanes.begin, lanes.end, s, S::set1(kMinusInfinity));
        lanes.index = S::add(lanes.index, S::set1(static_cast<float>(kBlockTokens)));
      }
      S::store(scores + token * kPeriod, s);
      m = S::max(s, m);  // m where s is NaN
    }
    if (views != nullptr && hide(scores, views + first_row, tokens)) m = maximum(scores, tokens);
    return m;
  }

  // The rows' views, each in its lanes; `index` is the lanes' token.
  struct LaneViews {
    F begin, end, position, minus_slope, index;
  };
  static LaneViews lane_views(const TileState& t, int first_row, const Run& run, const RowView* views) {
    float lanes[5][S::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) {
      const int row = first_row + (i % kPeriod < rows ? i % kPeriod : rows - 1);
      lanes[0][i] = views ? views[row].begin : 0.0f;
      lanes[1][i] = views ? views[row].end : static_cast<float>(run.tokens);
      lanes[2][i] = views ? views[row].position : 0.0f;
      lanes[3][i] = t.slopes ? -t.slopes[row] : 0.0f;
      lanes[4][i] = static_cast<float>(i / kPeriod);
    }
    return {S::load(lanes[0]), S::load(lanes[1]), S::load(lanes[2]), S::load(lanes[3]), S::load(lanes[4])};
  }

  // Takes hidden tokens out of the scores; false if there are none.
  static bool hide(float* scores, const RowView* views, int tokens) {
    uint64_t any = 0;
    for (int r = 0; r < rows; ++r) any |= views[r].hidden;
    if (any == 0) return false;
    for (int token = 0; token < tokens; ++token) {
      for (int r = 0; r < rows; ++r) {
        if (views[r].hidden >> token & 1) scores[token * kPeriod + r] = kMinusInfinity;
      }
    }
    return true;
  }

  static F maximum(const float* scores, int tokens) {
    F m = S::set1(kMinusInfinity);
    for (int i = 0; i < tokens * kPeriod; i += S::kLanes) m = S::max(S::load(scores + i), m);
    return m;
  }

  // Columns [column, column + chunks * kColumns) of the weighted sum of V, added to the rescaled output. Not
  // inlined: what the caller keeps in registers would push the sums out of them.
  template <int chunks, bool tail, int level>
  __attribute__((noinline)) static void add_values(const TileState& t, int first_row, const Run& run,
                                                   const RowsAhead& rows_ahead, int tokens,
                                                   const typename Format::Weight* weights,
                                                   const float* correction, int column) {
    const Format format(t);
    Ahead<kPaced, level> ahead(rows_ahead, column * sizeof(T) * tokens);
    F sums[chunks][rows][2];
    unrolled<chunks>([&](auto c) LEAN_INLINE {
      unrolled<rows>([&](auto r) LEAN_INLINE { sums[c][r][0] = sums[c][r][1] = S::zero(); });
    });
    const auto step = [&](unsigned i, const void* const* v_rows, const typename Format::Weight* weight,
                          const typename Format::Weight* again, auto load) LEAN_INLINE {
      unrolled<chunks>([&](auto c) LEAN_INLINE {
        const auto at = [&](const void* row) LEAN_INLINE {
          return static_cast<const T*>(row) + column + c * Format::kColumns;
        };
        const auto v = format.load_step(v_rows, [&](const T* row) LEAN_INLINE { return load(at(row)); });
        unrolled<rows>([&](auto r) LEAN_INLINE {
          ahead.template keep_up<Format::kTokensPerStep * Format::kColumns * sizeof(T)>(
              i, r, rows, at(v_rows[Format::kTokensPerStep - 1]));
          Format::accumulate(sums[c][r][0], sums[c][r][1], weight + r, (r % 2 ? again : weight) + r, v);
        });
      });
    };
    // The compiler would broadcast a weight to a register for the products that share it. Beside conversions
    // a core multiplies faster if every other weight is broadcast by its two multiplications themselves.
    const typename Format::Weight* again = weights;
    if constexpr (Format::kBroadcastsAgain && chunks == 1) asm("" : "+r"(again));
    const int columns = t.head_dim_v - column;  // that are left
    const void* const* v_rows = run.v_rows;
    for (const void* const* const end = v_rows + tokens; v_rows < end;) {
      unrolled<Format::kStepsAtOnce>([&](auto) LEAN_INLINE {
        const unsigned i = (v_rows - run.v_rows) / Format::kTokensPerStep;
        if constexpr (tail) {
          step(i, v_rows, weights, again,
               [&](const T* row) LEAN_INLINE { return Format::load_tail(row, columns); });
        } else {
          step(i, v_rows, weights, again, [](const T* row) LEAN_INLINE { return Format::load(row); });
        }
        v_rows += Format::kTokensPerStep;
        weights += kPeriod;
        again += kPeriod;
      });
    }
    const int64_t stride = t.output_stride;
    float* const output = t.output + first_row * stride + column;
    unrolled<chunks>([&](auto c) LEAN_INLINE {
      unrolled<rows>([&](auto r) LEAN_INLINE {
        float* out = output + r * stride + c * Format::kColumns;
        const F factor = S::set1(correction[r]);
        S::store(out, S::fma(S::load(out), factor, sums[c][r][0]));
        S::store(out + S::kLanes, S::fma(S::load(out + S::kLanes), factor, sums[c][r][1]));
      });
    });
  }

  // All columns.
  template <int level>
  static void add_all_values(const TileState& t, int first_row, const Run& run, const RowsAhead& ahead,
                             int tokens, const typename Format::Weight* weights, const float* correction) {
    // Few rows leave registers for more columns at once, which hides the latency of the additions.
    constexpr int kChunks = rows * 8 <= S::kLanes ? 4 : rows * 4 <= S::kLanes ? 2 : 1;
    const int whole = t.head_dim_v / Format::kColumns * Format::kColumns;
    int column = 0;
    for (; column + kChunks * Format::kColumns <= whole; column += kChunks * Format::kColumns) {
      add_values<kChunks, false, level>(t, first_row, run, ahead, tokens, weights, correction, column);
    }
    if constexpr (kChunks == 4) {
      if (column + 2 * Format::kColumns <= whole) {
        add_values<2, false, level>(t, first_row, run, ahead, tokens, weights, correction, column);
        column += 2 * Format::kColumns;
      }
    }
    for (; column < whole; column += Format::kColumns) {
      add_values<1, false, level>(t, first_row, run, ahead, tokens, weights, correction, column);
    }
    if (column < t.head_dim_v) {
      add_values<1, true, level>(t, first_row, run, ahead, tokens, weights, correction, column);
    }
  }

  // Makes weights of the scores, and adds the weighted sum of V to the output.
  __attribute__((noinline)) static void accumulate(const TileState& t, int first_row, float* scores,
                                                   const Run& run, const RowsAhead& ahead) {
    const int tokens = padded_tokens(run);
    float correction[S::kLanes];
    S::store(correction, weigh(t, first_row, scores, run, tokens, [&](int i, F a, F b) LEAN_INLINE {
               Format::template store_weights<kPeriod>(scores, i, a, b);
             }));
    const auto* weights = reinterpret_cast<const typename Format::Weight*>(scores);
    const auto add = ahead.cache_level == 1 ? add_all_values<1> : add_all_values<2>;
    add(t, first_row, run, ahead, tokens, weights, correction);
  }

  // The same for several heads' rows and a run of whole vectors of tokens.
  static void accumulate_abreast(const TileState* const* tiles, int heads, const Run& run,
                                 const RowsAhead& ahead) {
    for (int head = 0; head < heads; ++head) {
      const TileState& t = *tiles[head];
      const F correction = weigh(t, 0, t.scores, run, run.tokens, [&](int i, F a, F b) LEAN_INLINE {
        S::store(t.scores + i, a);
        S::store(t.scores + i + S::kLanes, b);
      });
      S::store(t.run_max, correction);  // whose place is free now
    }
    const RowsAhead own{run.v_rows, run.tokens, tiles[0]->head_dim_v * static_cast<int>(sizeof(T))};
    const auto add = ahead.cache_level == 1 ? add_values_abreast<1> : add_values_abreast<2>;
    add(tiles, heads, run, ahead.count > 0 ? ahead : own);
  }

  // Token by token with all heads of each, which is the order of addresses where a token's rows are
  // neighbours. The sums do not stay in registers.
  template <int level>
  __attribute__((noinline)) static void add_values_abreast(const TileState* const* tiles, int heads,
                                                           const Run& run, const RowsAhead& rows_ahead) {
    const int head_dim = tiles[0]->head_dim_v;
    const int64_t stride = tiles[0]->output_stride;
    Ahead<kPaced, level> ahead(rows_ahead, 0);
    for (int head = 0; head < heads; ++head) std::fill_n(tiles[head]->run_output, rows * stride, 0.0f);
    for (int token = 0; token < run.tokens; ++token) {
      const T* row = static_cast<const T*>(run.v_rows[token]);
      for (int head = 0; head < heads; ++head, row += head_dim) {
        float* const sums = tiles[head]->run_output;
        F weights[rows];
        unrolled<rows>([&](auto r)
                           LEAN_INLINE { weights[r] = S::set1(tiles[head]->scores[token * kPeriod + r]); });
        for_each_chunk<level>(row, head_dim, ahead, [&](int column, typename Format::Chunk v) LEAN_INLINE {
          unrolled<rows>([&](auto r) LEAN_INLINE {
            float* const to = sums + r * stride + column;
            F a = S::load(to), b = S::load(to + S::kLanes);
            Format::accumulate_token(a, b, weights[r], v);
            S::store(to, a);
            S::store(to + S::kLanes, b);
          });
        });
      }
    }
    for (int head = 0; head < heads; ++head) {
      const TileState& t = *tiles[head];
      for (int r = 0; r < rows; ++r) {
        const F correction = S::set1(t.run_max[r]);
        for (int64_t i = r * stride; i < (r + 1) * stride; i += S::kLanes) {
          S::store(t.output + i, S::fma(S::load(t.output + i), correction, S::load(t.run_output + i)));
        }
      }
    }
  }

  // Makes weights of the scores, which `store_weights` stores two vectors of at a time. Returns what O is to
  // be multiplied by.
  template <class Store>
  LEAN_INLINE static F weigh(const TileState& t, int first_row, const float* scores, const Run& run,
                             int tokens, const Store& store_weights) {
    // What scores are taken relative to need not be their maximum, only near enough for 2^(score - m) to stay
    // in range. It is left alone while it is that: a branch that is rarely taken, instead of a
    // wait for the run's maximum and for 2 to the power of what it differs by.
    F m = S::replicate<kPeriod>(t.m + first_row), correction = S::set1(1.0f);
    const F run_max = S::replicate<kPeriod>(t.run_max + first_row);
    if (S::any_above(run_max, S::add(m, S::set1(kSlack)))) {
      const F m_old = m;
      m = S::max(m, run_max);
      correction = exp2(S::sub(m_old, S::zero_where_minus_infinity(m)));
      S::store_rows<rows>(t.m + first_row, m);
    }
    // Rows that have seen nothing but -inf subtract 0, so that their weights are 0 and not NaN.
    const F m_safe = S::zero_where_minus_infinity(m);

    // Weights and their sum, fresh for each run: sums of sums keep fp32 accuracy over long
    // contexts.
    F l_run = S::zero();
    for (int i = 0; i < tokens * kPeriod; i += 2 * S::kLanes) {
      F p[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        p[j] = exp2(S::sub(S::load(scores + i + j * S::kLanes), m_safe));
        l_run = S::add(l_run, p[j]);
        if (run.v_scales != nullptr) {
          p[j] = S::mul(p[j], S::spread<kPeriod>(run.v_scales + i / kPeriod + j * kBlockTokens));
        }
      }
      store_weights(i, p[0], p[1]);
    }
    l_run = S::fold<kPeriod, S::add>(l_run);
    S::store_rows<rows>(t.l + first_row, S::fma(S::replicate<kPeriod>(t.l + first_row), correction, l_run));
    return correction;
  }

  static int64_t padded(int64_t columns) {
    return (columns + Format::kColumns - 1) / Format::kColumns * Format::kColumns;
  }
  // Elements of a packed query row.
  static_assert(S::kQueryCopies * sizeof(typename Format::Query) <= kMaxQueryCopies * sizeof(float));
  static int64_t query_stride(int64_t head_dim) { return S::kQueryCopies * padded(head_dim); }

  // Row `row` of the strip's, whose packed ones are at `to`: interleaved chunk by chunk, in the order in
  // which they are read.
  static void pack_query(typename Format::Query* to, int row, const typename Format::Tensor* q,
                         int head_dim) {
    if constexpr (kWholeRows) {
      to += row * Format::kColumns;
      for (int column = 0; column < head_dim; column += Format::kColumns) {
        Format::pack_whole_query(to + column * rows, q + column, head_dim - column);
      }
    } else {
      to += row * S::kQueryCopies * Format::kDotColumns;
      for (int column = 0; column < head_dim; column += Format::kDotColumns) {
        Format::pack_query(to + column * S::kQueryCopies * rows, q + column, head_dim - column);
      }
    }
  }
};
