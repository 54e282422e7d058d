// AVX-512 (F, BW, DQ, VL) vectors of 16 floats for microkernel-inl.h. Included by one source file per
// instruction set, inside its namespace and its target pragma.

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kMicrokernelRows = 8;         // 16 accumulators of 32 registers
  static constexpr bool kHasIntoL1 = true;           // kernels can prefetch into L1
  static constexpr bool kMultiplyBroadcasts = true;  // may take one factor from a word in memory
  static constexpr int kQueryCopies = 2;             // loads beat broadcasts (AMD's; unmeasured today)
  static constexpr ColumnOrder kHalfOrder = ColumnOrder::natural;  // load_pair's, of fp16
  using F = __m512;
  struct Pair {
    F a, b;
  };

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F abs(F x) { return _mm512_andnot_ps(set1(-0.0f), x); }
  static F copy_sign(F x, F sign) { return _mm512_or_ps(abs(x), _mm512_and_ps(set1(-0.0f), sign)); }
  // Returns the second operand where either is NaN.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  // Some lane of a is above that of b.
  static bool any_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  // Returns x, or `other` in the lanes where i is outside [begin, end).
  static F where_between(F i, F begin, F end, F x, F other) {
    const __mmask16 in = _mm512_cmp_ps_mask(i, begin, _CMP_GE_OQ) & _mm512_cmp_ps_mask(i, end, _CMP_LT_OQ);
    return _mm512_mask_blend_ps(in, other, x);
  }
  static F zero_where_minus_infinity(F x) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, set1(kMinusInfinity), _CMP_EQ_OQ), x, zero());
  }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // Returns x * 2^n for a whole n >= -127; zero for -127. (A scalef takes twice as long as these together.)
  static F scale_by_power(F x, F n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return mul(x, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
  }

  // Lane i of the result is lane i % period of p.
  template <int period>
  static F replicate(const float* p) {
    if constexpr (period == 1) return _mm512_set1_ps(*p);
    if constexpr (period == 2)
      return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd(reinterpret_cast<const double*>(p))));
    if constexpr (period == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (period == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    if constexpr (period == 16) return load(p);
  }

  // Stores the first lanes.
  template <int rows>
  static void store_rows(float* p, F x) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << rows) - 1), x);
  }

  // Lane i of the result is p[i / period].
  template <int period>
  static F spread(const float* p) {
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    if constexpr (period == kLanes) return set1(*p);
    constexpr int kShift = period == 8 ? 3 : period == 4 ? 2 : period == 2 ? 1 : 0;
    constexpr auto kNeeded = static_cast<__mmask16>((1u << kLanes / period) - 1);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(i, kShift), _mm512_maskz_loadu_ps(kNeeded, p));
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

  // Returns the halves of a, added up, in the lower half and those of b in the upper one.
  static F join_sums(F a, F b) {
    return add(_mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(1, 0, 1, 0)),
               _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 2, 3, 2)));
  }

  // Lane i of the result is the sum over the lower half of x[i], lane i + 8 that over its upper half.
  static F sum_halves(const F (&x)[8]) {
    F pairs[4], fours[2];  // 128-bit block k of fours[j]: sums of block k of x[4j], ..., x[4j + 3]
    for (int i = 0; i < 4; ++i) {
      pairs[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return add(_mm512_mask_shuffle_f32x4(fours[0], 0xf0f0, fours[1], fours[1], 0xA0),
               _mm512_mask_shuffle_f32x4(fours[1], 0x0f0f, fours[0], fours[0], 0xF5));
  }

  // Takes blocks of `period` lanes from the lower half and from the upper one in turn.
  template <int period>
  static F interleave_halves(F x) {
    if constexpr (period == 8) return x;
    alignas(64) static constexpr auto order = [] {
      std::array<int, kLanes> order{};
      for (int i = 0; i < kLanes; ++i) {
        order[i] = i / period % 2 * (kLanes / 2) + i / (2 * period) * period + i % period;
      }
      return order;
    }();
    return _mm512_permutexvar_ps(_mm512_load_si512(order.data()), x);
  }

  // Stores the lower half kQueryCopies times; loads it into both halves.
  static void store_query(float* p, F x) { store(p, x); }
  static F load_twice(const float* p) { return load_shared(p); }
  // Loads what several multiplications share.
  static F load_shared(const float* p) { return in_register(load(p)); }
  static F broadcast_shared(const float* p) { return in_register(set1(*p)); }
  // The compiler would read it from memory anew for each multiplication that it has part in, and a core has
  // fewer loads than multiplications to spare.
  template <class V>
  static V in_register(V x) {
    asm("" : "+v"(x));
    return x;
  }

  // Loads kLanes columns of two rows, each half of them in a and half in b, which is the same for every row:
  // the first row's are in the lower halves of a and b, the second's in the upper ones.
  static Pair load_halves(const float* lower, const float* upper) {
    return {join_halves(_mm256_loadu_ps(lower), _mm256_loadu_ps(upper)),
            join_halves(_mm256_loadu_ps(lower + 8), _mm256_loadu_ps(upper + 8))};
  }
  static Pair load_halves(const Half* lower, const Half* upper) {
    return {_mm512_cvtph_ps(_mm256_set_m128i(load_128(upper), load_128(lower))),
            _mm512_cvtph_ps(_mm256_set_m128i(load_128(upper + 8), load_128(lower + 8)))};
  }
  static Pair load_halves(const BFloat16* lower, const BFloat16* upper) {
    return split(join_halves(load_256(lower), load_256(upper)), BFloat16{});
  }
  static Pair load_halves(const int8_t* lower, const int8_t* upper) {
    const __m128i x = load_128(lower), y = load_128(upper);
    return {dequantise_int8(_mm_unpacklo_epi64(x, y)), dequantise_int8(_mm_unpackhi_epi64(x, y))};
  }
  // With 16 columns a tail is always 8.
  static Pair load_halves_tail(const float* lower, const float* upper, int) {
    return {join_halves(_mm256_loadu_ps(lower), _mm256_loadu_ps(upper)), zero()};
  }
  static Pair load_halves_tail(const Half* lower, const Half* upper, int) {
    return {_mm512_cvtph_ps(_mm256_set_m128i(load_128(upper), load_128(lower))), zero()};
  }
  static Pair load_halves_tail(const int8_t* lower, const int8_t* upper, int) {
    return {dequantise_int8(_mm_unpacklo_epi64(load_64(lower), load_64(upper))), zero()};
  }
  static Pair load_halves_tail(const BFloat16* lower, const BFloat16* upper, int) {
    const __m256i x = _mm256_zextsi128_si256(load_128(lower)), y = _mm256_zextsi128_si256(load_128(upper));
    return split(join_halves(x, y), BFloat16{});
  }

  // 2 * kLanes columns of a row, in the order that costs least to load: natural for fp32 and fp16,
  // even columns before odd ones for bf16. The tail forms touch `columns` of them, a multiple of 8.
  static Pair load_pair(const float* p) { return {load(p), load(p + 16)}; }
  static Pair load_pair_tail(const float* p, int columns) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(tail_mask(columns)), p),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(tail_mask(columns) >> 16), p + 16)};
  }
  static void store_pair_tail(float* p, int columns, F a, F b) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(tail_mask(columns)), a);
    _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(tail_mask(columns) >> 16), b);
  }

  static Pair load_pair(const Half* p) {
    return {_mm512_cvtph_ps(load_256(p)), _mm512_cvtph_ps(load_256(p + 16))};
  }
  static Pair load_pair(const BFloat16* p) { return split(_mm512_loadu_si512(p), BFloat16{}); }
  static Pair load_pair(const int8_t* p) {
    return {dequantise_int8(load_128(p)), dequantise_int8(load_128(p + 16))};
  }
  static Pair load_pair_tail(const int8_t* p, int columns) {
    const __mmask32 mask = tail_mask(columns);
    return {dequantise_int8(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), p)),
            dequantise_int8(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask >> 16), p + 16))};
  }
  template <class T>
  static Pair load_pair_tail(const T* p, int columns) {
    return split(_mm512_maskz_loadu_epi16(tail_mask(columns), p), T{});
  }
  template <class T>
  static void store_pair_tail(T* p, int columns, F a, F b) {
    _mm512_mask_storeu_epi16(p, tail_mask(columns), join(a, b, T{}));
  }

  // Returns a0, b0, a1, b1, ... in two vectors; deinterleave takes that back.
  static Pair interleave(Pair x) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {_mm512_permutex2var_ps(x.a, low, x.b), _mm512_permutex2var_ps(x.a, high, x.b)};
  }
  static Pair deinterleave(Pair x) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(x.a, even, x.b), _mm512_permutex2var_ps(x.a, odd, x.b)};
  }

  // Dequantises rows of fp8, which is sign and magnitude: the magnitude is looked up in the first half of the
  // table.
  template <class T>
  class Dequantiser {
   public:
    Dequantiser(DType, const DequantiseTable& table)
        : t0_(_mm512_load_si512(table.values)),
          t1_(_mm512_load_si512(table.values + 32)),
          t2_(_mm512_load_si512(table.values + 64)),
          t3_(_mm512_load_si512(table.values + 96)) {}

    void operator()(const uint8_t* row, int columns, T* to) const {
      int column = 0;
      for (; column + 32 <= columns; column += 32) {
        store_dequantised(to + column, dequantise(load_256(row + column)));
      }
      if (column == columns) return;
      const __mmask32 mask = tail_mask(columns - column);
      store_dequantised(to + column, mask, dequantise(_mm256_maskz_loadu_epi8(mask, row + column)));
    }

   private:
    // Returns the values in the table's format.
    __m512i dequantise(__m256i bytes) const {
      const __m512i i = _mm512_cvtepu8_epi16(bytes);
      const __m512i x = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(i, _mm512_set1_epi16(0x40)),
                                                _mm512_permutex2var_epi16(t0_, i, t1_),
                                                _mm512_permutex2var_epi16(t2_, i, t3_));
      return _mm512_ternarylogic_epi32(x, _mm512_slli_epi16(i, 8), _mm512_set1_epi16(-0x8000), 0xf8);
    }

    const __m512i t0_, t1_, t2_, t3_;
  };

  template <class T>
  static __m128i load_128(const T* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  template <class T>
  static __m256i load_256(const T* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static F join_halves(__m256 lower, __m256 upper) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(lower), upper, 1);
  }
  static __m512i join_halves(__m256i lower, __m256i upper) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
  }
  static __mmask32 tail_mask(int columns) { return static_cast<__mmask32>((uint64_t{1} << columns) - 1); }

 private:
  static __m128i load_64(const int8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static F dequantise_int8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
  static Pair split(__m512i x, Half) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(x)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))};
  }
  static Pair split(__m512i x, BFloat16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  template <class T>
  static void store_dequantised(T* to, __m512i x) {
    _mm512_storeu_si512(to, x);
  }
  template <class T>
  static void store_dequantised(T* to, __mmask32 mask, __m512i x) {
    _mm512_mask_storeu_epi16(to, mask, x);
  }
  static __m512i upper_bits(__m256i x) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
  static void store_dequantised(float* to, __m512i x) {
    _mm512_storeu_si512(to, upper_bits(_mm512_castsi512_si256(x)));
    _mm512_storeu_si512(to + 16, upper_bits(_mm512_extracti64x4_epi64(x, 1)));
  }
  static void store_dequantised(float* to, __mmask32 mask, __m512i x) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), upper_bits(_mm512_castsi512_si256(x)));
    _mm512_mask_storeu_epi32(to + 16, static_cast<__mmask16>(mask >> 16),
                             upper_bits(_mm512_extracti64x4_epi64(x, 1)));
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
