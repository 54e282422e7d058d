// The tile kernel for many rows, with products in fp32. Its steps are outer products whose sums stay in
// registers: of a column of query rows and that column of K rows, and of a token's weights and its V row.
// Unlike dot products they leave nothing to add up across a vector, and rows are converted once for all query
// rows. Included by one source file per instruction set, after tile_kernel-inl.h.

template <class T>
struct OuterProductKernel {
  using S = Simd;
  using F = S::F;
  using KvRows = Fp32Rows<T>;
  using FewRows = TileKernelFor<T>;
  static constexpr int kRows = S::kLanes;  // of a vector, a row in each lane
  using Softmax = Microkernel<T, KvRows, kRows>;
  using Shape = MicrokernelShape<T, KvRows, kRows>;
  static constexpr int kSums = 2 * S::kMicrokernelRows;  // vectors of them that stay in registers
  static constexpr int kColumns = KvRows::kColumns;

  static int64_t padded(int64_t dims) { return round_up(dims, kColumns); }

  // A thread's memory beside the states: a run's rows as floats.
  static int64_t scratch_bytes(int64_t dims) { return kRunTokens * padded(dims) * sizeof(float); }

  // Packed q: [vector of rows][column][row].
  static void pack_query(const TileState& t, int row, const void* q) {
    float* to = static_cast<float*>(t.q) + row / kRows * kRows * padded(t.head_dim);
    if (row % kRows == 0 && t.rows - row < kRows) std::fill_n(to, kRows * padded(t.head_dim), 0.0f);
    to += row % kRows;
    float floats[kMaxHeadDim + kColumns];
    convert(q, t.head_dim, floats);
    for (int i = 0; i < padded(t.head_dim); ++i, to += kRows) *to = floats[i];
  }

  // Writes a row of T as floats, chunk by chunk in the order of KvRows::load, which zeros fill up.
  static void convert(const void* row, int dims, float* to) {
    Shape::template in_steps<1>(dims, [&](auto, int column, auto load) LEAN_INLINE {
      const Simd::Pair x = load(static_cast<const T*>(row) + column);
      S::store(to + column, x.a);
      S::store(to + column + S::kLanes, x.b);
    });
  }

  // Says where the first `tokens` rows of a run are as floats: where they lie, or converted.
  static void find_floats(const TileState& t, const Rows& run, int tokens, int dims, const float** rows) {
    float* to = static_cast<float*>(t.scratch);
    const bool converts = KvRows::kConverts || dims % kColumns != 0;
    for (int i = 0; i < tokens; ++i, to += padded(dims)) {
      if (converts) convert(run.row[i], dims, to);
      rows[i] = converts ? to : static_cast<const float*>(run.row[i]);
    }
  }

  // Prefetches in every so many of the calls only: all that is to be prefetched is spread over the passes
  // that several rows make over the same tokens.
  class SpreadPrefetcher {
   public:
    SpreadPrefetcher(const Prefetch& prefetch, int passes) : prefetcher_(prefetch, 0), passes_(passes) {}

    // Prefetches as many bytes as the first pass reads in this step.
    template <int bytes>
    LEAN_INLINE void issue() {
      static_assert(bytes % kLine == 0);
      if (--left_ > 0) return;
      left_ = passes_;
#pragma GCC unroll 16
      for (int i = 0; i < bytes; i += kLine) prefetcher_.template issue<kLine>(0, 0, 1, nullptr);
    }

   private:
    PrefetcherInto<2, false> prefetcher_;
    const int passes_;
    int left_ = 1;
  };

  // Writes the scores of some tokens and one or two vectors of rows, and adds them to the maxima.
  template <int vectors>
  static void multiply_keys(const float* q, const float* const* keys, int dims, F scale, float* scores,
                            F (&maxima)[vectors], SpreadPrefetcher& prefetcher) {
    constexpr int kTokens = kSums / vectors, kStep = 8;  // the dims are a multiple of it
    const int64_t to_next = kRows * padded(dims);
    F sums[kTokens][vectors];
    unrolled<kTokens>([&](auto token) LEAN_INLINE {
      unrolled<vectors>([&](auto i) LEAN_INLINE { sums[token][i] = S::zero(); });
    });
    const int columns = static_cast<int>(KvRows::kConverts ? padded(dims) : dims);
    for (int first = 0; first < columns; first += kStep) {
      prefetcher.template issue<kTokens * kStep * sizeof(T)>();
      unrolled<kStep>([&](auto next) LEAN_INLINE {
        const int column = first + next;
        F rows[vectors];
        unrolled<vectors>([&](auto i)
                              LEAN_INLINE { rows[i] = S::load_shared(q + i * to_next + column * kRows); });
        unrolled<kTokens>([&](auto token) LEAN_INLINE {
          const F k = S::broadcast_shared(keys[token] + column);
          unrolled<vectors>([&](auto i) LEAN_INLINE { sums[token][i] = S::fma(k, rows[i], sums[token][i]); });
        });
      });
    }
    unrolled<kTokens>([&](auto token) LEAN_INLINE {
      unrolled<vectors>([&](auto i) LEAN_INLINE {
        const F s = scaled_score<ScoreMath>(sums[token][i], scale);
        S::store(scores + (i * kRunTokens + token) * kRows, s);
        maxima[i] = S::max(s, maxima[i]);  // the maximum so far where s is NaN
      });
    });
  }

  template <int vectors>
  static void score_rows(const TileState& t, int row, const float* const* keys, const Rows& run, int tokens,
                         const RowView* views, SpreadPrefetcher& prefetcher) {
    const float* const q = static_cast<const float*>(t.q) + row * padded(t.head_dim);
    float* const scores = t.scores + row * kRunTokens;
    F maxima[vectors];
    for (F& m : maxima) m = S::set1(kMinusInfinity);
    constexpr int kTokens = kSums / vectors;
    for (int token = 0; token < tokens; token += kTokens) {
      multiply_keys<vectors>(q, keys + token, t.head_dim, S::set1(t.scale), scores + token * kRows, maxima,
                             prefetcher);
    }
    for (int i = 0; i < vectors; ++i) {
      Softmax::finish_run(t, row + i * kRows, scores + i * kRunTokens * kRows, run, tokens, views, maxima[i]);
    }
  }

  static void score(const TileState& t, const Rows& run, const RowView* views, const Prefetch& prefetch) {
    const int tokens = padded_tokens(run);
    const float* keys[kRunTokens];
    find_floats(t, run, tokens, t.head_dim, keys);
    SpreadPrefetcher prefetcher(FewRows::some_prefetch(prefetch, run.row, t.head_dim),
                                ceil_div(t.rows, 2 * kRows));
    for (int row = 0; row < t.rows; row += 2 * kRows) {
      const auto score = row + kRows < t.rows ? score_rows<2> : score_rows<1>;
      score(t, row, keys, run, tokens, views, prefetcher);
    }
  }
  static int padded_tokens(const Rows& run) { return static_cast<int>(round_up(run.tokens, kSums)); }

  // Adds some rows' weighted sum of kColumns columns of V to the rescaled output.
  static void add_values(const float* weights, const float* const* values, int tokens, int column,
                         const float* corrections, float* output, int64_t stride,
                         SpreadPrefetcher& prefetcher) {
    F sums[S::kMicrokernelRows][2];
    unrolled<S::kMicrokernelRows>([&](auto r) LEAN_INLINE { sums[r][0] = sums[r][1] = S::zero(); });
    constexpr int kStep = 2;
    for (int first = 0; first < tokens; first += kStep) {
      prefetcher.template issue<kStep * kColumns * sizeof(T)>();
      unrolled<kStep>([&](auto i) LEAN_INLINE {
        const int token = first + i;
        const F a = S::load_shared(values[token] + column);
        const F b = S::load_shared(values[token] + column + S::kLanes);
        unrolled<S::kMicrokernelRows>([&](auto r) LEAN_INLINE {
          const F weight = S::broadcast_shared(weights + token * kRows + r);
          sums[r][0] = S::fma(weight, a, sums[r][0]);
          sums[r][1] = S::fma(weight, b, sums[r][1]);
        });
      });
    }
    unrolled<S::kMicrokernelRows>([&](auto r) LEAN_INLINE {
      float* const out = output + r * stride + column;
      const F correction = S::set1(corrections[r]);
      S::store(out, S::fma(S::load(out), correction, sums[r][0]));
      S::store(out + S::kLanes, S::fma(S::load(out + S::kLanes), correction, sums[r][1]));
    });
  }

  static void accumulate(const TileState& t, const Rows& run, const Prefetch& prefetch) {
    const int tokens = padded_tokens(run);
    float corrections[kMaxRows];
    for (int row = 0; row < t.rows; row += kRows) {
      float* const scores = t.scores + row * kRunTokens;
      const F correction = Softmax::weigh(t, row, scores, run, tokens, [&](int i, F a, F b) LEAN_INLINE {
        KvRows::template store_weights<kRows>(scores, i, a, b);
      });
      S::store(corrections + row, correction);
    }
    const float* values[kRunTokens];
    find_floats(t, run, tokens, t.head_dim_v, values);
    SpreadPrefetcher prefetcher(FewRows::some_prefetch(prefetch, run.row, t.head_dim_v),
                                FewRows::microkernels_of(t.rows));
    for (int column = 0; column < t.head_dim_v; column += kColumns) {
      for (int row = 0; row < t.rows; row += S::kMicrokernelRows) {
        const float* const weights = t.scores + row / kRows * kRows * kRunTokens + row % kRows;
        add_values(weights, values, tokens, column, corrections + row, t.output + row * t.output_stride,
                   t.output_stride, prefetcher);
      }
    }
  }

  // For output tiles of `min_rows` rows or more: with fewer, too many lanes would be empty.
  static constexpr TileKernel kernel(const char* instruction_set, int min_rows) {
    TileKernel r = FewRows::kernel(instruction_set);
    r.min_rows = min_rows;
    r.rows_at_once = kRows;
    r.max_rows_for_heads = 0;
    r.scratch_bytes = scratch_bytes;
    r.pack_query = pack_query;
    r.score = score;
    r.score_heads = nullptr;
    r.accumulate = accumulate;
    r.accumulate_heads = nullptr;
    return r;
  }
};
