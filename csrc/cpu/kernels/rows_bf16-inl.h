// Rows of bf16, multiplied by AVX-512's dot products of bf16. Included after tile_kernel-inl.h by the source
// files of the instruction sets that have those.

// vdpbf16ps adds two products of bf16 pairs to each fp32 lane. For q.k the pairs are neighbouring
// columns; for the weighted sum they are two tokens, whose V rows are interleaved and whose weights
// are rounded to bf16 (as every half-precision kernel does) and stored as pairs.
struct Bf16Rows {
  explicit Bf16Rows(const TileState&) {}

  using F = Simd::F;
  using Tensor = BFloat16;
  static constexpr DType kRowDtype = DType::bfloat16;
  using Query = BFloat16;
  using Weight = uint32_t;
  static constexpr int kDotColumns = 16;
  static constexpr int kColumns = 32;
  static constexpr int kTokensPerStep = 2;
  static constexpr int kStepsAtOnce = 2;
  static constexpr int kPairsAtOnce = 4;
  static constexpr bool kConverts = false;
  static constexpr bool kReadsWholeRows = true;
  static constexpr ColumnOrder kColumnOrder = ColumnOrder::pairs_of_fours;  // that of Step
  static constexpr bool kBroadcastsAgain = false;

  struct Chunk {
    __m512i x;
  };
  struct Step {
    __m512bh a,
        b;  // columns 8i..8i+3 and 8i+4..8i+7 of each eight, both tokens of a column together
  };

  static Chunk load(const BFloat16* row) { return {_mm512_loadu_si512(row)}; }
  static Chunk load_tail(const BFloat16* row, int columns) {
    return {_mm512_maskz_loadu_epi16(Simd::tail_mask(columns), row)};
  }
  static Chunk load_two(const BFloat16* lower, const BFloat16* upper) {
    return {Simd::join_halves(Simd::load_256(lower), Simd::load_256(upper))};
  }
  static Chunk load_two_tail(const BFloat16* lower, const BFloat16* upper, int) {  // 8 columns
    return {Simd::join_halves(_mm256_zextsi128_si256(Simd::load_128(lower)),
                              _mm256_zextsi128_si256(Simd::load_128(upper)))};
  }
  static Chunk load_query(const Query* q) { return {Simd::in_register(load(q).x)}; }
  static void pack_query(Query* to, const BFloat16* q, int columns) {
    _mm512_storeu_si512(to, (columns < kDotColumns ? load_two_tail(q, q, columns) : load_two(q, q)).x);
  }
  static Chunk load_whole_query(const Query* q) { return load(q); }
  static Chunk load_shared_query(const Query* q) { return load_query(q); }
  static void pack_whole_query(Query* to, const BFloat16* q, int columns) {
    _mm512_storeu_si512(to, load_tail(q, std::min(columns, kColumns)).x);
  }
  static F dot(F sum, Chunk k, Chunk q) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(k.x), reinterpret_cast<__m512bh>(q.x));
  }

  template <class Load>
  static Step load_step(const void* const* rows, const Load& load) {
    const __m512i v0 = load(static_cast<const BFloat16*>(rows[0])).x;
    const __m512i v1 = load(static_cast<const BFloat16*>(rows[1])).x;
    return {reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(v0, v1)),
            reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(v0, v1))};
  }
  static void accumulate(F& a, F& b, const Weight* weight, const Weight*, Step v) {
    const __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*weight)));
    a = _mm512_dpbf16_ps(a, w, v.a);
    b = _mm512_dpbf16_ps(b, w, v.b);
  }

  // A bf16 number is the upper half of the fp32 one.
  static void accumulate_token(F& a, F& b, F weight, Chunk v) {
    const __m512i zero = _mm512_setzero_si512();
    a = Simd::fma(weight, _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, v.x)), a);
    b = Simd::fma(weight, _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, v.x)), b);
  }

  // Two vectors of weights are two blocks of tokens, [token][row]; as pairs of bf16 weights they are
  // [token / 2][row][token % 2].
  template <int period>
  static __m512i pair_order() {
    alignas(64) static constexpr auto order = [] {
      std::array<uint16_t, 32> order{};
      for (int i = 0; i < 32; ++i) {
        order[i] = static_cast<uint16_t>((2 * (i / (2 * period)) + i % 2) * period + i / 2 % period);
      }
      return order;
    }();
    return _mm512_load_si512(order.data());
  }
  template <int period>
  static void store_weights(float* scores, int i, F a, F b) {
    const auto x = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    _mm512_storeu_si512(reinterpret_cast<Weight*>(scores) + i / 2,
                        _mm512_permutexvar_epi16(pair_order<period>(), x));
  }

  static void store_output(BFloat16* out, int columns, F a, F b) {
    alignas(64) static constexpr uint16_t order[32] = {0,  1,  2,  3,  16, 17, 18, 19, 4,  5,  6,
                                                       7,  20, 21, 22, 23, 8,  9,  10, 11, 24, 25,
                                                       26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
    const auto x = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    _mm512_mask_storeu_epi16(out, Simd::tail_mask(columns),
                             _mm512_permutexvar_epi16(_mm512_load_si512(order), x));
  }
};
