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

 private:
  // Returns x - high, and 0 where x is infinite.
  static Simd::F rest(Simd::F x, __m256i high) {
    const Simd::F wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    return _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(x, 0x18)), x, wide);
  }
};
