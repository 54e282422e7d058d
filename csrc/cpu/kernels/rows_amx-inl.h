// Rows that AMX multiplies: as one bf16 number each, or as sums of two. Included by the source files of
// instruction sets with AMX.

// A type of these says what parts a row's elements have. Vectors of 32 elements are pairs of neighbours.
struct AmxBf16Rows {
  using Tensor = BFloat16;  // q, K, V and out
  static constexpr DType kRowDtype = DType::bfloat16;
  static constexpr int kParts = 1;
  // Which parts of the left factor are multiplied with which of the right one, for the scores and for the
  // weighted sum.
  static constexpr int kScoreProducts[][2] = {{0, 0}};
  static constexpr int kSumProducts[][2] = {{0, 0}};

  struct Parts {
    __m512i part[kParts];
  };
  static Parts load(const Tensor* row, int columns) {
    return {_mm512_maskz_loadu_epi16(Simd::tail_mask(columns), row)};
  }
  static Parts split(Simd::F a, Simd::F b) { return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a))}; }
  static __m512i round(Simd::F a, Simd::F b) { return split(a, b).part[0]; }

  // The kernels that convert bf16 to fp32 have this order too.
  static constexpr ColumnOrder kColumnOrder = ColumnOrder::even_odd;
  // Pairs the columns of two tokens' rows: the even ones, and the odd ones.
  static __m512i pair_first(__m512i x, __m512i y) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, x, _mm512_slli_epi32(y, 16));
  }
  static __m512i pair_second(__m512i x, __m512i y) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(x, 16), y);
  }
  // Puts the first columns and the second ones in turn.
  static __m512i in_order(__m512i x) {
    alignas(64) static constexpr auto order = [] {
      std::array<uint16_t, 32> order{};
      for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i % 2 * 16 + i / 2);
      return order;
    }();
    return _mm512_permutexvar_epi16(_mm512_load_si512(order.data()), x);
  }
};

// fp16 has 11 bits, so that two bf16 numbers hold it exactly. Weights have 16 bits then, and beside their
// rounding the product of two low parts does not count.
struct AmxFp16Rows {
  using Tensor = Half;
  static constexpr DType kRowDtype = DType::float16;
  static constexpr int kParts = 2;  // the high one, and what it leaves
  static constexpr int kScoreProducts[][2] = {{0, 0}, {0, 1}, {1, 0}, {1, 1}};
  static constexpr int kSumProducts[][2] = {{0, 0}, {0, 1}, {1, 0}};

  struct Parts {
    __m512i part[kParts];
  };
  static Parts load(const Tensor* row, int columns) {
    const __m512i x = _mm512_maskz_loadu_epi16(Simd::tail_mask(columns), row);
    return split(_mm512_cvtph_ps(_mm512_castsi512_si256(x)),
                 _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)));
  }
  static Parts split(Simd::F a, Simd::F b) {
    const __m512i high = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    const Simd::F low_a = rest(a, _mm512_castsi512_si256(high));
    const Simd::F low_b = rest(b, _mm512_extracti64x4_epi64(high, 1));
    return {high, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(low_b, low_a))};
  }
  static __m512i round(Simd::F a, Simd::F b) {
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return Simd::join_halves(_mm512_cvtps_ph(a, kRound), _mm512_cvtps_ph(b, kRound));
  }

  static constexpr ColumnOrder kColumnOrder = ColumnOrder::natural;
  static __m512i pair_first(__m512i x, __m512i y) { return pair<0>(x, y); }
  static __m512i pair_second(__m512i x, __m512i y) { return pair<16>(x, y); }
  static __m512i in_order(__m512i x) { return x; }

 private:
  // Pairs 16 columns of two tokens' rows, from `first` on.
  template <int first>
  static __m512i pair(__m512i x, __m512i y) {
    alignas(64) static constexpr auto order = [] {
      std::array<uint16_t, 32> order{};
      for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i % 2 * 32 + first + i / 2);
      return order;
    }();
    return _mm512_permutex2var_epi16(x, _mm512_load_si512(order.data()), y);
  }

  // Returns x - high, and 0 where x is infinite.
  static Simd::F rest(Simd::F x, __m256i high) {
    const Simd::F wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    return _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(x, 0x18)), x, wide);
  }
};
