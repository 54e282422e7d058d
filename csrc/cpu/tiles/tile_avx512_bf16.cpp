// Tile routines for AVX-512 with bf16 dot products and byte permutations (VBMI).
#include "cpu/tiles/tile_sets.h"

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")
namespace lean::cpu::avx512_bf16 {
#include "cpu/tiles/simd_avx512.h"
#include "cpu/tiles/tile_impl.h"

// vdpbf16ps adds two products of bf16 pairs to each fp32 lane. For q.k the pairs are neighbouring
// columns; for the weighted sum they are two tokens, whose V rows are interleaved and whose weights
// are rounded to bf16 (as every half-precision kernel does) and stored as pairs.
struct Bf16Format {
  using F = Simd::F;
  using Tensor = BFloat16;
  static constexpr DType kRowDtype = DType::bfloat16;
  using Query = BFloat16;
  using Weight = uint32_t;
  static constexpr int kDotColumns = 16;
  static constexpr int kColumns = 32;
  static constexpr int kTokensPerStep = 2;

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
  static Chunk load_query(const Query* q) { return {_mm512_broadcast_i64x4(Simd::load_256(q))}; }
  static void pack_query(Query* to, const BFloat16* q, int columns) {
    store(to, columns < kDotColumns ? _mm256_zextsi128_si256(Simd::load_128(q)) : Simd::load_256(q));
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
  static void accumulate(F& a, F& b, const Weight* weight, Step v) {
    const __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*weight)));
    a = _mm512_dpbf16_ps(a, w, v.a);
    b = _mm512_dpbf16_ps(b, w, v.b);
  }

  // 32 weights are two blocks of tokens, [token][row]; in this order they are [token / 2][row][token % 2].
  template <int period>
  static __m512i pair_order() {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) {
      order[i] = static_cast<uint16_t>((2 * (i / (2 * period)) + i % 2) * period + i / 2 % period);
    }
    return _mm512_load_si512(order);
  }

  // Turns token-major fp32 weights into pairs of bf16 weights, in place.
  template <int period>
  static const Weight* pack_weights(float* scores, int tokens) {
    const __m512i permutation = pair_order<period>();
    auto* packed = reinterpret_cast<Weight*>(scores);
    for (int i = 0; i < tokens * period; i += 32) {
      const auto x = reinterpret_cast<__m512i>(
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(scores + i + 16), _mm512_loadu_ps(scores + i)));
      _mm512_storeu_si512(packed + i / 2, _mm512_permutexvar_epi16(permutation, x));
    }
    return packed;
  }

  static void store_output(BFloat16* out, int columns, F a, F b) {
    store_in_order(out, columns, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }

  // Low and high bytes are looked up apart, by the magnitude, and interleaved.
  class Widener {
   public:
    Widener(DType from, const WideningTable& table)
        : int8_(from == DType::int8),
          low0_(_mm512_load_si512(table.low)),
          low1_(_mm512_load_si512(table.low + 64)),
          high0_(_mm512_load_si512(table.high)),
          high1_(_mm512_load_si512(table.high + 64)) {}

    void operator()(const uint8_t* row, int columns, BFloat16* to) const {
      int column = 0;
      for (; column + 64 <= columns; column += 64) {
        const Wide x = widen(_mm512_loadu_si512(row + column));
        _mm512_storeu_si512(to + column, x.lower);
        _mm512_storeu_si512(to + column + 32, x.upper);
      }
      if (column == columns) return;
      const __mmask64 mask = (uint64_t{1} << (columns - column)) - 1;
      const Wide x = widen(_mm512_maskz_loadu_epi8(mask, row + column));
      _mm512_mask_storeu_epi16(to + column, static_cast<__mmask32>(mask), x.lower);
      _mm512_mask_storeu_epi16(to + column + 32, static_cast<__mmask32>(mask >> 32), x.upper);
    }

   private:
    struct Wide {
      __m512i lower, upper;
    };
    Wide widen(__m512i bytes) const {
      // So that interleaving within 128-bit lanes brings the columns into their order.
      bytes = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), bytes);
      const __m512i magnitude = int8_ ? _mm512_abs_epi8(bytes) : bytes, lowest = _mm512_set1_epi8(-128);
      const __m512i low = _mm512_permutex2var_epi8(low0_, magnitude, low1_);
      __m512i high = _mm512_permutex2var_epi8(high0_, magnitude, high1_);
      if (int8_) {  // 128 has no place in the table: in bf16 it is 0x4300
        high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(bytes, lowest), _mm512_set1_epi8(0x43));
      }
      high = _mm512_ternarylogic_epi32(high, bytes, lowest, 0xf8);  // the sign
      return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    }

    const bool int8_;
    const __m512i low0_, low1_, high0_, high1_;
  };

 protected:
  template <class To>
  static void store(To* to, __m256i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  }

  // Columns as load_step leaves them, those of a before those of b.
  template <class To>
  static void store_in_order(To* out, int columns, __m512i x) {
    alignas(64) static constexpr uint16_t order[32] = {0,  1,  2,  3,  16, 17, 18, 19, 4,  5,  6,
                                                       7,  20, 21, 22, 23, 8,  9,  10, 11, 24, 25,
                                                       26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
    _mm512_mask_storeu_epi16(out, Simd::tail_mask(columns),
                             _mm512_permutexvar_epi16(_mm512_load_si512(order), x));
  }
};

// fp16 queries over quantised rows, which bf16 holds exactly: queries and weights are sums of two bf16
// numbers, which hold 16 bits (fp16 has 11). That takes as many products as fp32 would, but no conversions.
// (Infinite numbers of e5m2 make NaN, because the low part may be 0.)
struct TwiceBf16Format : Bf16Format {
  using Tensor = Half;
  using Query = uint32_t;   // 16 columns: the high parts of all, then the low ones
  using Weight = uint64_t;  // the high parts of two tokens, then the low ones

  struct QueryParts {
    __m512i high, low;
  };
  struct Parts {
    __m256bh high, low;
  };

  static Parts split(F x) {
    const __m256bh high = _mm512_cvtneps_pbh(x);
    const __mmask16 infinite = _mm512_fpclass_ps_mask(x, 0x18);
    return {high, _mm512_cvtneps_pbh(_mm512_maskz_sub_ps(_knot_mask16(infinite), x, wide(high)))};
  }
  static F wide(__m256bh x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)), 16));
  }

  static void pack_query(Query* to, const Half* q, int columns) {
    const auto parts = split(_mm512_cvtph_ps(columns < kDotColumns ? _mm256_zextsi128_si256(Simd::load_128(q))
                                                                   : Simd::load_256(q)));
    store(to, reinterpret_cast<__m256i>(parts.high));
    store(to + 8, reinterpret_cast<__m256i>(parts.low));
  }
  static QueryParts load_query(const Query* q) {
    return {_mm512_broadcast_i64x4(Simd::load_256(q)), _mm512_broadcast_i64x4(Simd::load_256(q + 8))};
  }
  static F dot(F sum, Chunk k, QueryParts q) {
    return Bf16Format::dot(Bf16Format::dot(sum, k, {q.low}), k, {q.high});
  }

  template <int period>
  static const Weight* pack_weights(float* scores, int tokens) {
    const __m512i permutation = pair_order<period>();
    const auto in_order = [&](__m256bh a, __m256bh b) {
      return _mm512_permutexvar_epi16(
          permutation, Simd::join_halves(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
    };
    // Words 0, 16, 1, 17, ... of two vectors.
    const __m512i mix = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < tokens * period; i += 32) {
      const auto a = split(_mm512_loadu_ps(scores + i)), b = split(_mm512_loadu_ps(scores + i + 16));
      const __m512i high = in_order(a.high, b.high), low = in_order(a.low, b.low);
      _mm512_storeu_si512(scores + i, _mm512_permutex2var_epi32(high, mix, low));
      _mm512_storeu_si512(scores + i + 16,
                          _mm512_permutex2var_epi32(high, _mm512_add_epi32(mix, _mm512_set1_epi32(8)), low));
    }
    return reinterpret_cast<const Weight*>(scores);
  }
  static void accumulate(F& a, F& b, const Weight* weight, Step v) {
    const auto* parts = reinterpret_cast<const Bf16Format::Weight*>(weight);
    Bf16Format::accumulate(a, b, parts + 1, v);
    Bf16Format::accumulate(a, b, parts, v);
  }

  static void store_output(Half* out, int columns, F a, F b) {
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    store_in_order(out, columns, Simd::join_halves(_mm512_cvtps_ph(a, kRound), _mm512_cvtps_ph(b, kRound)));
  }
};

const TileRoutine bfloat16 = Tile<BFloat16, Bf16Format>::routine("avx512_bf16");
const TileRoutine float16_over_quantised = Tile<BFloat16, TwiceBf16Format>::routine("avx512_bf16");
}  // namespace lean::cpu::avx512_bf16
LEAN_TARGET_END
#endif
