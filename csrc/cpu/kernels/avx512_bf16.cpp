// The tile kernels for AVX-512 with bf16 dot products and byte permutations (VBMI).
#include "cpu/kernels/registry.h"

#include <array>

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")
namespace lean::cpu::avx512_bf16 {
#include "cpu/kernels/simd/avx512.h"
#include "cpu/kernels/tile_kernel-inl.h"

#include "cpu/kernels/rows_bf16-inl.h"

// Quantised rows, which bf16 holds exactly: they are dequantised in registers. Low and high bytes are looked
// up apart, by the magnitude, and interleaved, which happens within the 128-bit lanes and so reorders
// columns.
template <bool int8>
class QuantisedRows : public Bf16Rows {
 public:
  explicit QuantisedRows(const TileState& t)
      : Bf16Rows(t),
        low0_(_mm512_load_si512(t.table->low)),
        low1_(_mm512_load_si512(t.table->low + 64)),
        high0_(_mm512_load_si512(t.table->high)),
        high1_(_mm512_load_si512(t.table->high + 64)) {}

  static constexpr int kDotColumns = 32;
  static constexpr ColumnOrder kColumnOrder = ColumnOrder::natural;  // that of load_step
  static constexpr int kPairsAtOnce = 2;                             // of twice the columns
  static constexpr bool kConverts = true;
  static constexpr bool kReadsWholeRows = false;

  // Columns 0-7 and 16-23 in a, the others in b; the first row's in the lower halves.
  struct Chunk {
    __m512i a, b;
  };
  Chunk load_two(const uint8_t* lower, const uint8_t* upper) const {
    return dequantise(Simd::join_halves(Simd::load_256(lower), Simd::load_256(upper)));
  }
  Chunk load_two_tail(const uint8_t* lower, const uint8_t* upper, int columns) const {
    return dequantise(Simd::join_halves(load_tail(lower, columns), load_tail(upper, columns)));
  }
  static void pack_query(Query* to, const BFloat16* q, int columns) {
    store_twice(to, _mm512_maskz_loadu_epi16(Simd::tail_mask(std::min(columns, kDotColumns)), q));
  }
  static Chunk load_query(const Query* q) {
    return {Simd::in_register(_mm512_loadu_si512(q)), Simd::in_register(_mm512_loadu_si512(q + 32))};
  }
  static F dot(F sum, Chunk k, Chunk q) {
    return Bf16Rows::dot(Bf16Rows::dot(sum, {k.a}, {q.a}), {k.b}, {q.b});
  }

  static __m256i load(const uint8_t* row) { return Simd::load_256(row); }
  static __m256i load_tail(const uint8_t* row, int columns) {
    return _mm256_maskz_loadu_epi8(Simd::tail_mask(columns), row);
  }
  template <class Load>
  Step load_step(const void* const* rows, const Load& load) const {
    // Bytes of the two tokens alternate, in the order that makes the columns of a and b follow each other.
    alignas(64) static constexpr auto order = [] {
      std::array<uint8_t, 64> order{};
      for (int i = 0; i < 64; ++i) {
        const int lane = i / 16, column = i % 16 < 8 ? 4 * lane + i % 8 / 2 : 16 + 4 * lane + i % 8 / 2;
        order[i] = static_cast<uint8_t>(i % 2 * 32 + column);
      }
      return order;
    }();
    const __m512i bytes = Simd::join_halves(load(static_cast<const uint8_t*>(rows[0])),
                                            load(static_cast<const uint8_t*>(rows[1])));
    const Chunk v = dequantise(_mm512_permutexvar_epi8(_mm512_load_si512(order.data()), bytes));
    return {reinterpret_cast<__m512bh>(v.a), reinterpret_cast<__m512bh>(v.b)};
  }
  static void store_output(BFloat16* out, int columns, F a, F b) {
    _mm512_mask_storeu_epi16(out, Simd::tail_mask(columns),
                             reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }

 protected:
  // Stores 32 columns as a Chunk of both halves.
  template <class To>
  static void store_twice(To* to, __m512i x) {
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(x, x, _MM_SHUFFLE(2, 0, 2, 0)));
    _mm512_storeu_si512(to + 64 / sizeof(To), _mm512_shuffle_i32x4(x, x, _MM_SHUFFLE(3, 1, 3, 1)));
  }

 private:
  Chunk dequantise(__m512i bytes) const {
    const __m512i magnitude = int8 ? _mm512_abs_epi8(bytes) : bytes, lowest = _mm512_set1_epi8(-128);
    const __m512i low = _mm512_permutex2var_epi8(low0_, magnitude, low1_);
    __m512i high = _mm512_permutex2var_epi8(high0_, magnitude, high1_);
    if constexpr (int8) {  // 128 has no place in the table: in bf16 it is 0x4300
      high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitude), _mm512_set1_epi8(0x43));
    }
    high = _mm512_ternarylogic_epi32(high, bytes, lowest, 0xf8);  // the sign
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }

  const __m512i low0_, low1_, high0_, high1_;
};

// Rows of fp8 for fp16 queries: queries and weights are sums of two bf16 numbers, which hold 16 bits (fp16
// has 11). That takes as many products as fp32 would, but no conversions. (Infinite numbers of e5m2 make NaN,
// because the low part may be 0.)
struct TwiceFp8Rows : QuantisedRows<false> {
  using Base = QuantisedRows<false>;
  using Base::Base;
  using Tensor = Half;
  using Query = uint32_t;                 // the high parts of a chunk, then the low ones
  using Weight = uint64_t;                // the high parts of two tokens, then the low ones
  static constexpr int kStepsAtOnce = 1;  // which has as many products as two of others

  struct QueryParts {
    Chunk high, low;
  };
  struct Parts {
    __m256bh high, low;
  };

  static Parts split(F x) {
    const __m256bh high = _mm512_cvtneps_pbh(x);
    const __mmask16 infinite = _mm512_fpclass_ps_mask(x, 0x18);
    return {high, _mm512_cvtneps_pbh(_mm512_maskz_sub_ps(_knot_mask16(infinite), x, to_float(high)))};
  }
  static F to_float(__m256bh x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)), 16));
  }
  static __m512i join(__m256bh a, __m256bh b) {
    return Simd::join_halves(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  }

  static void pack_query(Query* to, const Half* q, int columns) {
    const __m512i x = _mm512_maskz_loadu_epi16(Simd::tail_mask(std::min(columns, Base::kDotColumns)), q);
    const Parts a = split(_mm512_cvtph_ps(_mm512_castsi512_si256(x)));
    const Parts b = split(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)));
    Base::store_twice(to, join(a.high, b.high));
    Base::store_twice(to + 32, join(a.low, b.low));
  }
  static QueryParts load_query(const Query* q) {
    const auto* parts = reinterpret_cast<const Base::Query*>(q);
    return {Base::load_query(parts), Base::load_query(parts + 64)};
  }
  static F dot(F sum, Chunk k, QueryParts q) { return Base::dot(Base::dot(sum, k, q.low), k, q.high); }

  template <int period>
  static void store_weights(float* scores, int i, F a, F b) {
    // Words 0, 16, 1, 17, ... of two vectors.
    const __m512i mix = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i permutation = pair_order<period>();
    const Parts x = split(a), y = split(b);
    const __m512i high = _mm512_permutexvar_epi16(permutation, join(x.high, y.high));
    const __m512i low = _mm512_permutexvar_epi16(permutation, join(x.low, y.low));
    _mm512_storeu_si512(scores + i, _mm512_permutex2var_epi32(high, mix, low));
    _mm512_storeu_si512(scores + i + 16,
                        _mm512_permutex2var_epi32(high, _mm512_add_epi32(mix, _mm512_set1_epi32(8)), low));
  }
  static void accumulate(F& a, F& b, const Weight* weight, const Weight*, Step v) {
    const auto* parts = reinterpret_cast<const Base::Weight*>(weight);
    Base::accumulate(a, b, parts + 1, parts + 1, v);
    Base::accumulate(a, b, parts, parts, v);
  }

  static void store_output(Half* out, int columns, F a, F b) {
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm512_mask_storeu_epi16(out, Simd::tail_mask(columns),
                             Simd::join_halves(_mm512_cvtps_ph(a, kRound), _mm512_cvtps_ph(b, kRound)));
  }
};

const TileKernel bfloat16 = TileKernelFor<BFloat16, Bf16Rows>::kernel_as_is("avx512_bf16");
const TileKernel bfloat16_over_fp8 =
    TileKernelFor<uint8_t, QuantisedRows<false>>::kernel_as_is("avx512_bf16");
const TileKernel bfloat16_over_int8 =
    TileKernelFor<uint8_t, QuantisedRows<true>>::kernel_as_is("avx512_bf16");
const TileKernel float16_over_fp8 = TileKernelFor<uint8_t, TwiceFp8Rows>::kernel_as_is("avx512_bf16");
}  // namespace lean::cpu::avx512_bf16
LEAN_TARGET_END
#endif
