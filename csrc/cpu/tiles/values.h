// V: a strip's online softmax over a run of tokens, and the weighted sum. Included by tile_impl.h.

// By how much scores, in units of log2, may exceed what they are taken relative to.
constexpr float kSlack = 8;

template <class T, class Format, int rows>
struct ValueStrip : StripShape<T, Format, rows> {
  using Base = StripShape<T, Format, rows>;
  using S = Simd;
  using F = S::F;
  using Base::kBlockTokens;
  using Base::kPaced;
  using Base::kPeriod;
  using Base::padded_tokens;

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
    const auto add = ahead.cache_level == 1 ? add_values_abreast<1> : add_values_abreast<2>;
    add(tiles, heads, run, ahead);
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
        Base::template for_each_chunk<level>(row, head_dim, ahead,
                                             [&](int column, typename Format::Chunk v) LEAN_INLINE {
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
};
