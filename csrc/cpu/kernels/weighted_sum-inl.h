// The weighted sum: a microkernel's online softmax over a run of tokens, and the sum of their V rows.
// Included by tile_kernel-inl.h.

// Scores, in units of log2, may exceed what they are taken relative to by this much.
constexpr float kSlack = 8;

template <class T, class KvRows, int rows>
struct WeightedSum : MicrokernelShape<T, KvRows, rows> {
  using Base = MicrokernelShape<T, KvRows, rows>;
  using S = Simd;
  using F = S::F;
  using Base::kBlockTokens;
  using Base::kPeriod;
  using Base::padded_tokens;
  using typename Base::IntoL1;
  using typename Base::IntoL2;

  // Adds columns [column, column + chunks * kColumns) of the weighted sum of V to the rescaled output. Not
  // inlined: what the caller keeps in registers would push the sums out of them.
  template <int chunks, bool tail, class Prefetcher>
  __attribute__((noinline)) static void add_values(const TileState& t, int first_row, const Rows& run,
                                                   const Prefetch& prefetch, int tokens,
                                                   const typename KvRows::Weight* weights,
                                                   const float* correction, int column) {
    static_assert(Base::kRoundTokens % (KvRows::kTokensPerStep * KvRows::kStepsAtOnce) == 0);
    const KvRows kv_rows(t);
    Prefetcher prefetcher(prefetch, column * sizeof(T) * tokens);
    F sums[chunks][rows][2];
    unrolled<chunks>([&](auto c) LEAN_INLINE {
      unrolled<rows>([&](auto r) LEAN_INLINE { sums[c][r][0] = sums[c][r][1] = S::zero(); });
    });
    const auto step = [&](unsigned i, const void* const* v_rows, const typename KvRows::Weight* weight,
                          const typename KvRows::Weight* again, auto load) LEAN_INLINE {
      unrolled<chunks>([&](auto c) LEAN_INLINE {
        const auto at = [&](const void* row) LEAN_INLINE {
          return static_cast<const T*>(row) + column + c * KvRows::kColumns;
        };
        const auto v = kv_rows.load_step(v_rows, [&](const T* row) LEAN_INLINE { return load(at(row)); });
        unrolled<rows>([&](auto r) LEAN_INLINE {
          prefetcher.template issue<KvRows::kTokensPerStep * KvRows::kColumns * sizeof(T)>(
              i, r, rows, at(v_rows[KvRows::kTokensPerStep - 1]));
          KvRows::accumulate(sums[c][r][0], sums[c][r][1], weight + r, (r % 2 ? again : weight) + r, v);
        });
      });
    };
    // The compiler would broadcast a weight to a register for the products that share it. Beside conversions
    // a core multiplies faster if every other weight is broadcast by its two multiplications themselves.
    const typename KvRows::Weight* again = weights;
    if constexpr (KvRows::kBroadcastsAgain && chunks == 1) asm("" : "+r"(again));
    const int columns = t.head_dim_v - column;  // this many are left
    const void* const* v_rows = run.row;
    for (const void* const* const end = v_rows + tokens; v_rows < end;) {
      unrolled<KvRows::kStepsAtOnce>([&](auto) LEAN_INLINE {
        const unsigned i = (v_rows - run.row) / KvRows::kTokensPerStep;
        if constexpr (tail) {
          step(i, v_rows, weights, again,
               [&](const T* row) LEAN_INLINE { return KvRows::load_tail(row, columns); });
        } else {
          step(i, v_rows, weights, again, [](const T* row) LEAN_INLINE { return KvRows::load(row); });
        }
        v_rows += KvRows::kTokensPerStep;
        weights += kPeriod;
        again += kPeriod;
      });
    }
    const int64_t stride = t.output_stride;
    float* const output = t.output + first_row * stride + column;
    unrolled<chunks>([&](auto c) LEAN_INLINE {
      unrolled<rows>([&](auto r) LEAN_INLINE {
        float* out = output + r * stride + c * KvRows::kColumns;
        const F factor = S::set1(correction[r]);
        S::store(out, S::fma(S::load(out), factor, sums[c][r][0]));
        S::store(out + S::kLanes, S::fma(S::load(out + S::kLanes), factor, sums[c][r][1]));
      });
    });
  }

  // Adds all columns.
  template <class Prefetcher>
  static void add_all_values(const TileState& t, int first_row, const Rows& run, const Prefetch& prefetch,
                             int tokens, const typename KvRows::Weight* weights, const float* correction) {
    // Few rows leave registers for more columns at once, which hides the latency of the additions.
    constexpr int kChunks = rows * 8 <= S::kLanes ? 4 : rows * 4 <= S::kLanes ? 2 : 1;
    const int whole = t.head_dim_v / KvRows::kColumns * KvRows::kColumns;
    int column = 0;
    for (; column + kChunks * KvRows::kColumns <= whole; column += kChunks * KvRows::kColumns) {
      add_values<kChunks, false, Prefetcher>(t, first_row, run, prefetch, tokens, weights, correction,
                                             column);
    }
    if constexpr (kChunks == 4) {
      if (column + 2 * KvRows::kColumns <= whole) {
        add_values<2, false, Prefetcher>(t, first_row, run, prefetch, tokens, weights, correction, column);
        column += 2 * KvRows::kColumns;
      }
    }
    for (; column < whole; column += KvRows::kColumns) {
      add_values<1, false, Prefetcher>(t, first_row, run, prefetch, tokens, weights, correction, column);
    }
    if (column < t.head_dim_v) {
      add_values<1, true, Prefetcher>(t, first_row, run, prefetch, tokens, weights, correction, column);
    }
  }

  // Makes weights of the scores, and adds the weighted sum of V to the output.
  __attribute__((noinline)) static void accumulate(const TileState& t, int first_row, float* scores,
                                                   const Rows& run, const Prefetch& prefetch) {
    const int tokens = padded_tokens(run);
    float correction[S::kLanes];
    S::store(correction, weigh(t, first_row, scores, run, tokens, [&](int i, F a, F b) LEAN_INLINE {
               KvRows::template store_weights<kPeriod>(scores, i, a, b);
             }));
    const auto* weights = reinterpret_cast<const typename KvRows::Weight*>(scores);
    const auto add = prefetch.cache_level == 1 ? add_all_values<IntoL1> : add_all_values<IntoL2>;
    add(t, first_row, run, prefetch, tokens, weights, correction);
  }

  // The same for several heads' rows and a run of whole vectors of tokens.
  static void accumulate_heads(const TileState* const* heads, int count, const Rows& run,
                               const Prefetch& prefetch) {
    for (int head = 0; head < count; ++head) {
      const TileState& t = *heads[head];
      const F correction = weigh(t, 0, t.scores, run, run.tokens, [&](int i, F a, F b) LEAN_INLINE {
        S::store(t.scores + i, a);
        S::store(t.scores + i + S::kLanes, b);
      });
      S::store(t.run_max,
               correction);  // the maximum is no longer needed; add_values_of_heads takes this from there
    }
    const auto add = prefetch.cache_level == 1 ? add_values_of_heads<IntoL1> : add_values_of_heads<IntoL2>;
    add(heads, count, run, prefetch);
  }

  // Goes token by token with all heads of each, which is the order of addresses where a token's rows are
  // neighbours. The sums do not stay in registers.
  template <class Prefetcher>
  __attribute__((noinline)) static void add_values_of_heads(const TileState* const* heads, int count,
                                                            const Rows& run, const Prefetch& prefetch) {
    const int head_dim = heads[0]->head_dim_v;
    const int64_t stride = heads[0]->output_stride;
    Prefetcher prefetcher(prefetch, 0);
    for (int head = 0; head < count; ++head) std::fill_n(heads[head]->run_output, rows * stride, 0.0f);
    for (int token = 0; token < run.tokens; ++token) {
      const T* row = static_cast<const T*>(run.row[token]);
      for (int head = 0; head < count; ++head, row += head_dim) {
        float* const sums = heads[head]->run_output;
        F weights[rows];
        unrolled<rows>([&](auto r)
                           LEAN_INLINE { weights[r] = S::set1(heads[head]->scores[token * kPeriod + r]); });
        Base::for_each_chunk(row, head_dim, prefetcher,
                             [&](int column, typename KvRows::Chunk v) LEAN_INLINE {
                               unrolled<rows>([&](auto r) LEAN_INLINE {
                                 float* const to = sums + r * stride + column;
                                 F a = S::load(to), b = S::load(to + S::kLanes);
                                 KvRows::accumulate_token(a, b, weights[r], v);
                                 S::store(to, a);
                                 S::store(to + S::kLanes, b);
                               });
                             });
      }
    }
    for (int head = 0; head < count; ++head) {
      const TileState& t = *heads[head];
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
  LEAN_INLINE static F weigh(const TileState& t, int first_row, const float* scores, const Rows& run,
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

    // Weights and their sum begin anew in each run: sums of sums keep fp32 accuracy over long contexts.
    F l_run = S::zero();
    for (int i = 0; i < tokens * kPeriod; i += 2 * S::kLanes) {
      F p[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        p[j] = exp2(S::sub(S::load(scores + i + j * S::kLanes), m_safe));
        l_run = S::add(l_run, p[j]);
        if (run.scales != nullptr) {
          p[j] = S::mul(p[j], S::spread<kPeriod>(run.scales + i / kPeriod + j * kBlockTokens));
        }
      }
      store_weights(i, p[0], p[1]);
    }
    l_run = S::fold<kPeriod, S::add>(l_run);
    S::store_rows<rows>(t.l + first_row, S::fma(S::replicate<kPeriod>(t.l + first_row), correction, l_run));
    return correction;
  }
};
