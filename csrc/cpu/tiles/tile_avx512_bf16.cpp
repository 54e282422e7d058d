// Tile routines for AVX-512 with bf16 dot products.
#include "cpu/tiles/tile_sets.h"

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace lean::cpu::avx512_bf16 {
#include "cpu/tiles/simd_avx512.h"
#include "cpu/tiles/tile_impl.h"

// vdpbf16ps adds two products of bf16 pairs to each fp32 lane. For q.k the pairs are neighbouring
// columns; for the weighted sum they are two tokens, whose V rows are interleaved and whose weights
// are rounded to bf16 (as every half-precision kernel does) and stored as pairs.
struct Bf16Format {
  using F = Simd::F;
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
  static void store_query(Query* q, Chunk x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_castsi512_si256(x.x));
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

  // Turns token-major fp32 weights into pairs of bf16 weights, in place: 32 of them are two tokens
  // blocks, [token][row], and become [token / 2][row][token % 2].
  template <int period>
  static const Weight* pack_weights(float* scores, int tokens) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) {
      order[i] = static_cast<uint16_t>((2 * (i / (2 * period)) + i % 2) * period + i / 2 % period);
    }
    const __m512i permutation = _mm512_load_si512(order);
    auto* packed = reinterpret_cast<Weight*>(scores);
    for (int i = 0; i < tokens * period; i += 32) {
      const auto x = reinterpret_cast<__m512i>(
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(scores + i + 16), _mm512_loadu_ps(scores + i)));
      _mm512_storeu_si512(packed + i / 2, _mm512_permutexvar_epi16(permutation, x));
    }
    return packed;
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

const TileRoutine bfloat16 = Tile<BFloat16, Bf16Format>::routine("avx512_bf16");
}  // namespace lean::cpu::avx512_bf16
LEAN_TARGET_END
#endif
