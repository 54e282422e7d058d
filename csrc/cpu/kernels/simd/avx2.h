// AVX2 with FMA and F16C: vectors of 8 floats for microkernel-inl.h. See avx512.h for the meaning of
// the operations.

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kMicrokernelRows = 4;          // 8 accumulators of 16 registers
  static constexpr bool kHasIntoL1 = false;           // kernels can prefetch into L1
  static constexpr bool kMultiplyBroadcasts = false;  // may take one factor from a word in memory
  static constexpr int kQueryCopies = 1;
  static constexpr ColumnOrder kHalfOrder = ColumnOrder::natural;  // load_pair's, of fp16
  using F = __m256;
  struct Pair {
    F a, b;
  };

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F abs(F x) { return _mm256_andnot_ps(set1(-0.0f), x); }
  static F copy_sign(F x, F sign) { return _mm256_or_ps(abs(x), _mm256_and_ps(set1(-0.0f), sign)); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static bool any_above(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
  static F where_between(F i, F begin, F end, F x, F other) {
    return _mm256_blendv_ps(
        other, x, _mm256_and_ps(_mm256_cmp_ps(i, begin, _CMP_GE_OQ), _mm256_cmp_ps(i, end, _CMP_LT_OQ)));
  }
  static F zero_where_minus_infinity(F x) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(kMinusInfinity), _CMP_EQ_OQ), x);
  }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale_by_power(F x, F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  template <int period>
  static F replicate(const float* p) {
    if constexpr (period == 1) return _mm256_broadcast_ss(p);
    if constexpr (period == 2)
      return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
    if constexpr (period == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    if constexpr (period == 8) return load(p);
  }

  template <int rows>
  static void store_rows(float* p, F x) {
    float lanes[kLanes];
    store(lanes, x);
    memcpy(p, lanes, rows * sizeof(float));
  }

  template <int period>
  static F spread(const float* p) {
    if constexpr (period == 1) return load(p);
    if constexpr (period == 2) {
      return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                      _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0));
    }
    if constexpr (period == 4) return _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0]));
    if constexpr (period == 8) return set1(*p);
  }

  template <int period, F (*op)(F, F)>
  static F fold(F x) {
    if constexpr (period <= 4) x = op(x, _mm256_permute2f128_ps(x, x, 0x01));
    if constexpr (period <= 2) x = op(x, _mm256_permute_ps(x, 0x4E));
    if constexpr (period <= 1) x = op(x, _mm256_permute_ps(x, 0xB1));
    return x;
  }

  static F join_sums(F a, F b) {
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }

  static F sum_halves(const F (&x)[4]) {
    return _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  }

  template <int period>
  static F interleave_halves(F x) {
    if constexpr (period == 4) return x;
    if constexpr (period == 2) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), _MM_SHUFFLE(3, 1, 2, 0)));
    }
    if constexpr (period == 1) {
      return _mm256_permutevar8x32_ps(x, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    }
  }

  // Stores the lower half kQueryCopies times; loads it into both halves.
  static void store_query(float* p, F x) { _mm_storeu_ps(p, _mm256_castps256_ps128(x)); }
  static F load_shared(const float* p) { return load(p); }
  static F broadcast_shared(const float* p) { return set1(*p); }
  static F load_twice(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }

  static Pair load_halves(const float* lower, const float* upper) {
    return {_mm256_set_m128(_mm_loadu_ps(upper), _mm_loadu_ps(lower)),
            _mm256_set_m128(_mm_loadu_ps(upper + 4), _mm_loadu_ps(lower + 4))};
  }
  static Pair load_halves(const Half* lower, const Half* upper) {
    const __m128i x = load_128(lower), y = load_128(upper);
    return {_mm256_cvtph_ps(_mm_unpacklo_epi64(x, y)), _mm256_cvtph_ps(_mm_unpackhi_epi64(x, y))};
  }
  static Pair load_halves(const BFloat16* lower, const BFloat16* upper) {
    return split(_mm256_set_m128i(load_128(upper), load_128(lower)), BFloat16{});
  }
  static Pair load_halves(const int8_t* lower, const int8_t* upper) {
    const __m128i x = _mm_unpacklo_epi32(load_64(lower), load_64(upper));  // their first 4, their last 4
    return {dequantise_int8(x), dequantise_int8(_mm_unpackhi_epi64(x, x))};
  }

  // Dequantises rows of fp8.
  template <class T>
  class Dequantiser {
   public:
    Dequantiser(DType from, const DequantiseTable&) : from_(from) {}

    void operator()(const uint8_t* row, int columns, T* to) const {
      for (int column = 0; column < columns; column += 8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + column));
        store_exact(to + column, dequantise_fp8(_mm_cvtepu8_epi16(bytes)));
      }
    }

   private:
    F dequantise_fp8(__m128i x) const {
      if (from_ == DType::float8_e5m2) return _mm256_cvtph_ps(_mm_slli_epi16(x, 8));
      // e4m3's exponent and mantissa mean 2^8 times what they mean in fp16. It has no infinity, and NaN where
      // all their bits are set.
      const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7f));
      const __m128i nan = _mm_srli_epi16(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), 1);
      const __m128i sign = _mm_slli_epi16(_mm_sub_epi16(x, magnitude), 8);
      const __m128i bits = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), nan);
      return mul(_mm256_cvtph_ps(bits), set1(256.0f));
    }
    static void store_exact(float* to, F x) { store(to, x); }
    static void store_exact(Half* to, F x) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_NO_EXC));
    }
    static void store_exact(BFloat16* to, F x) {
      const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
    }

    const DType from_;
  };

  // With 8 columns there is never a tail.
  template <class T>
  static Pair load_halves_tail(const T*, const T*, int) {
    return {zero(), zero()};
  }

  static Pair load_pair(const float* p) { return {load(p), load(p + 8)}; }
  // With chunks of 16 columns a tail is always 8.
  static Pair load_pair_tail(const float* p, int) { return {load(p), zero()}; }
  static void store_pair_tail(float* p, int columns, F a, F b) {
    store(p, a);
    if (columns == 16) store(p + 8, b);
  }

  static Pair load_pair(const int8_t* p) {
    return {dequantise_int8(load_64(p)), dequantise_int8(load_64(p + 8))};
  }
  static Pair load_pair_tail(const int8_t* p, int) { return {dequantise_int8(load_64(p)), zero()}; }

  // Returns a0, b0, a1, b1, ... in two vectors; deinterleave takes that back.
  static Pair interleave(Pair x) {
    const F low = _mm256_unpacklo_ps(x.a, x.b), high = _mm256_unpackhi_ps(x.a, x.b);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  static Pair deinterleave(Pair x) {
    const auto in_order = [](F y) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(y), _MM_SHUFFLE(3, 1, 2, 0)));
    };
    return {in_order(_mm256_shuffle_ps(x.a, x.b, _MM_SHUFFLE(2, 0, 2, 0))),
            in_order(_mm256_shuffle_ps(x.a, x.b, _MM_SHUFFLE(3, 1, 3, 1)))};
  }

  template <class T>
  static Pair load_pair(const T* p) {
    return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
  }
  template <class T>
  static Pair load_pair_tail(const T* p, int) {
    return split(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), T{});
  }
  template <class T>
  static void store_pair_tail(T* p, int columns, F a, F b) {
    const __m256i x = join(a, b, T{});
    if (columns == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(x));
    }
  }

 private:
  template <class T>
  static __m128i load_128(const T* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static __m128i load_64(const int8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static F dequantise_int8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
  static Pair split(__m256i x, Half) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  }
  static Pair split(__m256i x, BFloat16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static __m256i join(F a, F b, Half) {
    return _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                            _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static __m256i join(F even, F odd, BFloat16) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_to_bf16(even), 16), round_to_bf16(odd), 0xaa);
  }
  static __m256i round_to_bf16(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                              _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
};
