// AVX-512 (F, BW, DQ, VL) vectors of 16 floats for tile_impl.h. Included by one source file per
// instruction set, inside its namespace and its target pragma.

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kStripRows = 8;  // 16 accumulators of 32 registers
  using F = __m512;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // The second operand where either is NaN.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  // x, or `other` in the lanes where i is outside [begin, end).
  static F where_between(F i, F begin, F end, F x, F other) {
    const __mmask16 in = _mm512_cmp_ps_mask(i, begin, _CMP_GE_OQ) & _mm512_cmp_ps_mask(i, end, _CMP_LT_OQ);
    return _mm512_mask_blend_ps(in, other, x);
  }
  static F zero_where_minus_infinity(F x) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, set1(kMinusInfinity), _CMP_EQ_OQ), x, zero());
  }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for a whole n >= -127; zero for -127.
  static F scale_by_power(F x, F n) {
    const __mmask16 normal = _mm512_cmp_ps_mask(n, set1(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, x, n);
  }

  // Lane i of the result is lane i % period of p.
  template <int period>
  static F replicate(const float* p) {
    if constexpr (period == 1) return _mm512_set1_ps(*p);
    if constexpr (period == 2)
      return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd(reinterpret_cast<const double*>(p))));
    if constexpr (period == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (period == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  }

  // Combines the lanes that are equal modulo `period`; every lane gets the result of its class.
  template <int period, F (*op)(F, F)>
  static F fold(F x) {
    if constexpr (period <= 8) x = op(x, _mm512_shuffle_f32x4(x, x, 0x4E));
    if constexpr (period <= 4) x = op(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    if constexpr (period <= 2) x = op(x, _mm512_permute_ps(x, 0x4E));
    if constexpr (period <= 1) x = op(x, _mm512_permute_ps(x, 0xB1));
    return x;
  }

  // Lane i of the result is the sum over the lanes of x[i].
  static F sum_each(const F (&x)[16]) {
    F quarter[4];  // quarter[j], 128-bit block k: partial sums of x[4k + j]
    for (int j = 0; j < 4; ++j) {
      const F low =
          add(_mm512_shuffle_f32x4(x[j], x[4 + j], 0x44), _mm512_shuffle_f32x4(x[j], x[4 + j], 0xEE));
      const F high = add(_mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x44),
                         _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xEE));
      quarter[j] = add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
    }
    const F a = add(_mm512_unpacklo_ps(quarter[0], quarter[1]), _mm512_unpackhi_ps(quarter[0], quarter[1]));
    const F b = add(_mm512_unpacklo_ps(quarter[2], quarter[3]), _mm512_unpackhi_ps(quarter[2], quarter[3]));
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
               _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
  }

  // 2 * kLanes columns of a row, in the order that costs least to load: natural for fp32 and fp16,
  // even columns before odd ones for bf16. The tail forms touch `columns` of them, a multiple of 8.
  static void load_pair(const float* p, F& a, F& b) {
    a = load(p);
    b = load(p + 16);
  }
  static void load_pair_tail(const float* p, int columns, F& a, F& b) {
    a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(tail_mask(columns)), p);
    b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(tail_mask(columns) >> 16), p + 16);
  }
  static void store_pair_tail(float* p, int columns, F a, F b) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(tail_mask(columns)), a);
    _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(tail_mask(columns) >> 16), b);
  }

  static void load_pair(const Half* p, F& a, F& b) { split(_mm512_loadu_si512(p), Half{}, a, b); }
  static void load_pair(const BFloat16* p, F& a, F& b) { split(_mm512_loadu_si512(p), BFloat16{}, a, b); }
  template <class T>
  static void load_pair_tail(const T* p, int columns, F& a, F& b) {
    split(_mm512_maskz_loadu_epi16(tail_mask(columns), p), T{}, a, b);
  }
  template <class T>
  static void store_pair_tail(T* p, int columns, F a, F b) {
    _mm512_mask_storeu_epi16(p, tail_mask(columns), join(a, b, T{}));
  }

  static __mmask32 tail_mask(int columns) { return static_cast<__mmask32>((uint64_t{1} << columns) - 1); }

 private:
  static void split(__m512i x, Half, F& a, F& b) {
    a = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
    b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
  }
  static void split(__m512i x, BFloat16, F& even, F& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static __m512i join(F a, F b, Half) {
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)),
        _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 1);
  }
  static __m512i join(F even, F odd, BFloat16) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_to_bf16(even), 16),
                                   round_to_bf16(odd));
  }
  // Rounds to nearest even at bit 16; the low half keeps rubbish. NaN stays NaN.
  static __m512i round_to_bf16(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded,
                                   _mm512_set1_epi32(0x7fc00000));
  }
};
