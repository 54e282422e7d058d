// Scores: the packed query rows of a microkernel, their dot products with the K rows of a run, and what is
// made of these. Included by tile_kernel-inl.h.

#include "score-inl.h"

template <class T, class KvRows, int rows>
struct Scores : MicrokernelShape<T, KvRows, rows> {
  using Base = MicrokernelShape<T, KvRows, rows>;
  using S = Simd;
  using F = S::F;
  using Base::kBlockTokens;
  using Base::kFewRows;
  using Base::kPeriod;
  using Base::kRoundTokens;
  using Base::kWholeRows;
  using Base::padded_tokens;
  using typename Base::IntoL1;
  using typename Base::IntoL2;

  // The dot products of so many pairs of tokens are summed at a time, so that they share loads of q. They are
  // few where memory is the bound: the fewer rows are read together, the closer the reads come to the order
  // of addresses.
  static constexpr int kPairs = kBlockTokens / 2;  // of one score vector
  static constexpr int kPairsAtOnce = kFewRows || kPairs < 2 ? 2 : KvRows::kPairsAtOnce;

  // Computes the dot products of kRoundTokens tokens, which are two vectors, some tokens together, column by
  // column. `q` holds the microkernel's packed rows. Each product is summed in half a vector: an accumulator
  // holds one row's sums for two neighbouring tokens, so that half as many need reducing.
  template <class Prefetcher>
  LEAN_INLINE static void dot_tokens_together(const KvRows& kv_rows, int head_dim,
                                              const typename KvRows::Query* q, const void* const* k_rows,
                                              Prefetcher& prefetcher, F (&dots)[2]) {
    constexpr int kColumns = KvRows::kDotColumns;
    F sums[2][S::kLanes / 2];
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) sums[i % 2][i / 2] = S::zero();
#pragma GCC unroll 16
    for (int first = 0; first < 2 * kPairs; first += kPairsAtOnce) {
      const void* const* group = k_rows + 2 * first;
      const typename KvRows::Query* q_chunk = q;
      auto add_chunk = [&](size_t column, auto load) LEAN_INLINE {
        const auto at = [&](int token) { return static_cast<const T*>(group[token]) + column; };
        typename KvRows::Chunk k[kPairsAtOnce];
#pragma GCC unroll 16
        for (int i = 0; i < kPairsAtOnce; ++i) k[i] = load(at(2 * i), at(2 * i + 1));
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r, q_chunk += S::kQueryCopies * kColumns) {
          prefetcher.template issue<2 * kPairsAtOnce * kColumns * sizeof(T)>(
              static_cast<unsigned>(column) / kColumns, r, rows, at(2 * kPairsAtOnce - 1));
          const auto chunk = KvRows::load_query(q_chunk);
#pragma GCC unroll 16
          for (int i = 0; i < kPairsAtOnce; ++i) {
            F& sum = sums[(first + i) / kPairs][(first + i) % kPairs * kPeriod + r];
            sum = KvRows::dot(sum, k[i], chunk);
          }
        }
      };
      const size_t whole = head_dim / kColumns * kColumns;
      for (size_t column = 0; column < whole; column += kColumns) {
        add_chunk(column, [&](const T* a, const T* b) { return kv_rows.load_two(a, b); });
      }
      if (const int tail = head_dim - static_cast<int>(whole); tail > 0) {
        add_chunk(whole, [&](const T* a, const T* b) { return kv_rows.load_two_tail(a, b, tail); });
      }
    }
    dots[0] = S::interleave_halves<kPeriod>(S::sum_halves(sums[0]));
    dots[1] = S::interleave_halves<kPeriod>(S::sum_halves(sums[1]));
  }

  // Adds up the elements of each sum and returns a vector of the results, token-major.
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

  // Computes the same row by row.
  template <class Prefetcher>
  LEAN_INLINE static void dot_row_by_row(int head_dim, const typename KvRows::Query* q,
                                         const void* const* k_rows, Prefetcher& prefetcher, F (&dots)[2]) {
    // So many chunks of each query row fit into registers beside the sums.
    constexpr int kQueryVectors = S::kLanes / 2;
    constexpr int kChunkVectors = sizeof(typename KvRows::Chunk) / sizeof(F);
    constexpr int kChunks = std::min(4, kQueryVectors / kPeriod) / kChunkVectors;
    static_assert(kChunks >= 1);
    unrolled<2>([&](auto block) LEAN_INLINE {
      const void* const* const group = k_rows + block * kBlockTokens;
      F sums[kBlockTokens][rows];
      unrolled<kBlockTokens>([&](auto token) LEAN_INLINE {
        unrolled<rows>([&](auto r) LEAN_INLINE { sums[token][r] = S::zero(); });
      });
      Base::template in_steps<kChunks>(head_dim, [&](auto chunks, int column, auto load) LEAN_INLINE {
        typename KvRows::Chunk q_chunks[rows][chunks];
        unrolled<rows>([&](auto r) LEAN_INLINE {
          unrolled<chunks>([&](auto c) LEAN_INLINE {
            q_chunks[r][c] =
                KvRows::load_shared_query(q + (column + c * KvRows::kColumns) * rows + r * KvRows::kColumns);
          });
        });
        unrolled<kBlockTokens>([&](auto token) LEAN_INLINE {
          const T* const row = static_cast<const T*>(group[token]) + column;
          prefetcher.template issue<chunks * KvRows::kColumns * sizeof(T)>(token, 0, 1, row);
          unrolled<chunks>([&](auto c) LEAN_INLINE {
            const typename KvRows::Chunk k = load(row + c * KvRows::kColumns);
            unrolled<rows>(
                [&](auto r) LEAN_INLINE { sums[token][r] = KvRows::dot(sums[token][r], k, q_chunks[r][c]); });
          });
        });
      });
      dots[block] = reduce(sums);
    });
  }

  // Writes the dot products of several heads' rows with a run of whole vectors of tokens: token by token with
  // all heads of each, which is the order of addresses where a token's rows are neighbours.
  template <class Prefetcher>
  __attribute__((noinline)) static void multiply_keys_of_heads(const TileState* const* heads, int count,
                                                               const Rows& run, const Prefetch& prefetch) {
    const int head_dim = heads[0]->head_dim;
    Prefetcher prefetcher(prefetch, 0);
    const T* row = static_cast<const T*>(run.row[0]);
    for (int token = 0, head = 0; token < run.tokens;) {
      // There are as many pairs of a token and a head as tokens in a vector of one head's scores. (Four are
      // unrolled, which is faster; sixteen are not: that would be a third of the kernels' code.)
      F sums[kBlockTokens][rows];
      float* scores[kBlockTokens];
      const auto multiply_row = [&](auto i) LEAN_INLINE {
        const auto* const q = static_cast<const typename KvRows::Query*>(heads[head]->q);
        scores[i] = heads[head]->scores + token * kPeriod;
        F of_row[rows];
        unrolled<rows>([&](auto r) LEAN_INLINE { of_row[r] = S::zero(); });
        Base::for_each_chunk(row, head_dim, prefetcher,
                             [&](int column, typename KvRows::Chunk k) LEAN_INLINE {
                               unrolled<rows>([&](auto r) LEAN_INLINE {
                                 const auto* const q_chunk = q + column * rows + r * KvRows::kColumns;
                                 of_row[r] = KvRows::dot(of_row[r], k, KvRows::load_whole_query(q_chunk));
                               });
                             });
        unrolled<rows>([&](auto r) LEAN_INLINE { sums[i][r] = of_row[r]; });
        row += head_dim;
        if (++head == count) {
          head = 0;
          if (++token < run.tokens) row = static_cast<const T*>(run.row[token]);
        }
      };
      if constexpr (kBlockTokens <= 4) {
        unrolled<kBlockTokens>(multiply_row);
      } else {
#pragma GCC unroll 1
        for (int i = 0; i < kBlockTokens; ++i) multiply_row(i);
      }
      alignas(64) float dots[S::kLanes];
      S::store(dots, reduce(sums));
      unrolled<kBlockTokens>(
          [&](auto i) LEAN_INLINE { memcpy(scores[i], dots + i * kPeriod, kPeriod * sizeof(float)); });
    }
  }

  // Writes the scaled dot products of the run's tokens, and of some after them, and returns their maximum per
  // row. Not inlined, nor are the loops over V: what the callers keep in registers would push the sums out of
  // them.
  template <class Prefetcher>
  __attribute__((noinline)) static F multiply_keys(const TileState& t, int first_row, float* dots,
                                                   const Rows& run, int tokens, const Prefetch& prefetch) {
    // These are copies, because for all the compiler knows storing a score changes what lies behind t.
    [[maybe_unused]] const KvRows kv_rows(t);
    const int head_dim = t.head_dim;
    const F scale = S::set1(t.scale);
    const auto* q = static_cast<const typename KvRows::Query*>(t.q) + first_row * query_stride(head_dim);
    Prefetcher prefetcher(prefetch, 0);
    F m = S::set1(kMinusInfinity);
    for (int token = 0; token < tokens; token += kRoundTokens) {
      F x[2];
      if constexpr (kWholeRows) {
        dot_row_by_row(head_dim, q, run.row + token, prefetcher, x);
      } else {
        dot_tokens_together(kv_rows, head_dim, q, run.row + token, prefetcher, x);
      }
      unrolled<2>([&](auto i) LEAN_INLINE {
        const F s = scaled_score<ScoreMath>(x[i], scale);
        S::store(dots + (token + i * kBlockTokens) * kPeriod, s);
        m = S::max(s, m);  // m where s is NaN
      });
    }
    return m;
  }

  // Writes the scores of the run's tokens, and of some after them, and their maximum per row.
  static void score(const TileState& t, int first_row, float* scores, const Rows& run, const RowView* views,
                    const Prefetch& prefetch) {
    const int tokens = padded_tokens(run);
    const auto multiply = prefetch.cache_level == 1 ? multiply_keys<IntoL1> : multiply_keys<IntoL2>;
    finish_run(t, first_row, scores, run, tokens, views,
               multiply(t, first_row, scores, run, tokens, prefetch));
  }

  // The same for several heads' rows and a run of whole vectors of tokens.
  static void score_heads(const TileState* const* heads, int count, const Rows& run, const RowView* views,
                          const Prefetch& prefetch) {
    const auto multiply =
        prefetch.cache_level == 1 ? multiply_keys_of_heads<IntoL1> : multiply_keys_of_heads<IntoL2>;
    multiply(heads, count, run, prefetch);
    for (int head = 0; head < count; ++head) {
      const TileState& t = *heads[head];
      const F scale = S::set1(t.scale);
      F m = S::set1(kMinusInfinity);
      for (int i = 0; i < run.tokens * kPeriod; i += S::kLanes) {
        const F s = scaled_score<ScoreMath>(S::load(t.scores + i), scale);
        S::store(t.scores + i, s);
        m = S::max(s, m);  // m where s is NaN
      }
      finish_run(t, 0, t.scores, run, run.tokens, views, m);
    }
  }

  // Makes scores of scaled dot products, whose maximum is `m`, and notes the maximum per row.
  static void finish_run(const TileState& t, int first_row, float* scores, const Rows& run, int tokens,
                         const RowView* views, F m) {
    if (views != nullptr || tokens != run.tokens || !t.score.only_scale() || run.scales != nullptr) {
      m = finish_scores(t, first_row, scores, run, tokens, views);
    }
    S::store(t.run_max + first_row, S::fold<kPeriod, S::max>(m));
  }

  // Makes scores of scaled dot products, where that takes more. Returns their maximum per row.
  static F finish_scores(const TileState& t, int first_row, float* scores, const Rows& run, int tokens,
                         const RowView* views) {
    const bool masked = views != nullptr || tokens != run.tokens;
    const float* const scales = run.scales;
    LaneViews lanes{};
    if (masked) lanes = lane_views(t, first_row, run, views);
    ScoreTerms<ScoreMath> terms(t.score);
    terms.row_scaled = scales != nullptr;
    terms.biased = masked && t.slopes != nullptr;
    F m = S::set1(kMinusInfinity);
    for (int token = 0; token < tokens; token += kBlockTokens) {
      const F s = modified_score<ScoreMath>(
          S::load(scores + token * kPeriod), terms,
          [&]() LEAN_INLINE { return S::spread<kPeriod>(scales + token); },
          [&]() LEAN_INLINE { return lanes.minus_slope; },
          [&]() LEAN_INLINE { return S::abs(S::sub(lanes.position, lanes.index)); },
          [&](F score) LEAN_INLINE {
            if (!masked) return score;
            return S::where_between(lanes.index, lanes.begin, lanes.end, score, S::set1(kMinusInfinity));
          });
      lanes.index = S::add(lanes.index, S::set1(static_cast<float>(kBlockTokens)));
      S::store(scores + token * kPeriod, s);
      m = S::max(s, m);  // m where s is NaN
    }
    if (views != nullptr && hide(scores, views + first_row, tokens)) m = maximum(scores, tokens);
    return m;
  }

  // The rows' views, each in its own lanes; `index` is the lanes' token.
  struct LaneViews {
    F begin, end, position, minus_slope, index;
  };
  static LaneViews lane_views(const TileState& t, int first_row, const Rows& run, const RowView* views) {
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

  static int64_t padded(int64_t columns) {
    return (columns + KvRows::kColumns - 1) / KvRows::kColumns * KvRows::kColumns;
  }
  // A packed query row has query_stride elements.
  static_assert(S::kQueryCopies * sizeof(typename KvRows::Query) <= kMaxQueryCopies * sizeof(float));
  static int64_t query_stride(int64_t head_dim) { return S::kQueryCopies * padded(head_dim); }

  // Packs row `row` of the microkernel's, whose packed ones are at `to`: interleaved chunk by chunk, in the
  // order in which they are read.
  static void pack_query(typename KvRows::Query* to, int row, const typename KvRows::Tensor* q,
                         int head_dim) {
    if constexpr (kWholeRows) {
      to += row * KvRows::kColumns;
      for (int column = 0; column < head_dim; column += KvRows::kColumns) {
        KvRows::pack_whole_query(to + column * rows, q + column, head_dim - column);
      }
    } else {
      to += row * S::kQueryCopies * KvRows::kDotColumns;
      for (int column = 0; column < head_dim; column += KvRows::kDotColumns) {
        KvRows::pack_query(to + column * S::kQueryCopies * rows, q + column, head_dim - column);
      }
    }
  }
};
