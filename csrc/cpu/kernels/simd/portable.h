// Vectors of 4 floats in GCC's vector extension, which compiles to SSE2, NEON or whatever a target has. See
// avx512.h for the meaning of the operations.

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kMicrokernelRows = 2;
  static constexpr bool kHasIntoL1 = false;           // kernels can prefetch into L1
  static constexpr bool kMultiplyBroadcasts = false;  // may take one factor from a word in memory
  static constexpr int kQueryCopies = 1;
  static constexpr ColumnOrder kHalfOrder = ColumnOrder::even_odd;  // load_pair's, of fp16
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef uint64_t U64 __attribute__((vector_size(16)));
  struct Pair {
    F a, b;
  };

  static F zero() { return F{}; }
  static F set1(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { memcpy(p, &x, sizeof x); }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F div(F a, F b) { return a / b; }
  static F abs(F x) { return as_float(as_bits(x) & 0x7fffffff); }
  static F copy_sign(F x, F sign) {
    return as_float((as_bits(x) & 0x7fffffff) | (as_bits(sign) & 0x80000000));
  }
  static F max(F a, F b) { return a > b ? a : b; }
  static bool any_above(F a, F b) {
    const auto above = (U64)(a > b);
    return (above[0] | above[1]) != 0;
  }
  static F where_between(F i, F begin, F end, F x, F other) { return ((i >= begin) & (i < end)) ? x : other; }
  static F zero_where_minus_infinity(F x) { return x == set1(kMinusInfinity) ? zero() : x; }
  // Adding 1.5 * 2^23 leaves a whole number in the low bits, for |x| < 2^22.
  static F round(F x) {
    const F magic = set1(12582912.0f);
    return (x + magic) - magic;
  }
  static F scale_by_power(F x, F n) { return x * as_float((U)((__builtin_convertvector(n, I) + 127) << 23)); }

  template <int period>
  static F replicate(const float* p) {
    if constexpr (period == 1) return set1(p[0]);
    if constexpr (period == 2) return F{p[0], p[1], p[0], p[1]};
  }

  template <int rows>
  static void store_rows(float* p, F x) {
    memcpy(p, &x, rows * sizeof(float));
  }

  template <int period>
  static F spread(const float* p) {
    if constexpr (period == 1) return load(p);
    if constexpr (period == 2) return F{p[0], p[0], p[1], p[1]};
  }

  template <int period, F (*op)(F, F)>
  static F fold(F x) {
    x = op(x, shuffle<2, 3, 0, 1>(x, x));
    if constexpr (period <= 1) x = op(x, shuffle<1, 0, 3, 2>(x, x));
    return x;
  }

  static F join_sums(F a, F b) { return shuffle<0, 1, 4, 5>(a, b) + shuffle<2, 3, 6, 7>(a, b); }

  static F sum_halves(const F (&x)[2]) {
    return shuffle<0, 4, 2, 6>(x[0], x[1]) + shuffle<1, 5, 3, 7>(x[0], x[1]);
  }

  template <int period>
  static F interleave_halves(F x) {
    if constexpr (period == 2) return x;
    if constexpr (period == 1) return shuffle<0, 2, 1, 3>(x, x);
  }

  // Stores the lower half kQueryCopies times; loads it into both halves.
  static void store_query(float* p, F x) { memcpy(p, &x, sizeof x / 2); }
  static F load_twice(const float* p) { return replicate<2>(p); }
  static F load_shared(const float* p) { return load(p); }

  static Pair load_halves(const float* lower, const float* upper) {
    const F x = load(lower), y = load(upper);
    return {shuffle<0, 1, 4, 5>(x, y), shuffle<2, 3, 6, 7>(x, y)};
  }
  template <class T>
  static Pair load_halves(const T* lower, const T* upper) {
    uint64_t a, b;
    memcpy(&a, lower, sizeof a);
    memcpy(&b, upper, sizeof b);
    return split((U)U64{a, b}, T{});
  }
  // With 4 columns for the dot products and 8 for the weighted sum there is never a tail.
  template <class T>
  static Pair load_halves_tail(const T*, const T*, int) {
    return {zero(), zero()};
  }

  // Dequantises rows, element by element.
  template <class T>
  class Dequantiser {
   public:
    Dequantiser(DType, const DequantiseTable& table) : values_(table.values) {}

    void operator()(const uint8_t* row, int columns, T* to) const {
      for (int i = 0; i < columns; ++i) {
        if constexpr (sizeof(T) == 4) {
          const uint32_t bits = uint32_t{values_[row[i]]} << 16;
          memcpy(to + i, &bits, sizeof bits);
        } else {
          to[i].bits = values_[row[i]];
        }
      }
    }

   private:
    const uint16_t* values_;
  };

  static Pair load_pair(const float* p) { return {load(p), load(p + 4)}; }
  template <class T>
  static Pair load_pair(const T* p) {
    U x;
    memcpy(&x, p, sizeof x);
    return split(x, T{});
  }
  template <class T>
  static Pair load_pair_tail(const T*, int) {
    return {zero(), zero()};
  }
  static void store_pair_tail(float* p, int, F a, F b) {
    store(p, a);
    store(p + 4, b);
  }
  template <class T>
  static void store_pair_tail(T* p, int, F even, F odd) {
    const U x = narrow(even, T{}) | narrow(odd, T{}) << 16;
    memcpy(p, &x, sizeof x);
  }

 private:
  template <int... i>
  static F shuffle(F a, F b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, i...);
#else
    return __builtin_shuffle(a, b, I{i...});
#endif
  }

  // Returns even columns in a, odd ones in b (of a little-endian machine).
  static Pair split(U x, BFloat16) { return {as_float(x << 16), as_float(x & 0xffff0000)}; }
  static Pair split(U x, Half) { return {half_to_float(x & 0xffff), half_to_float(x >> 16)}; }
  // Shifts the fp16 bits to where fp32 has them and multiplies by 2^112, the difference of the
  // exponents' biases, which makes subnormals right; infinity and NaN get the largest exponent back.
  static F half_to_float(U bits) {
    const F scaled = as_float((bits & 0x7fff) << 13) * set1(0x1p112f);
    const U special = (U)((bits & 0x7c00) == 0x7c00);
    return as_float(as_bits(scaled) | (special & 0x7f800000) | ((bits & 0x8000) << 16));
  }
  static U narrow(F x, BFloat16) {
    const U bits = as_bits(x);
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? rounded : (U{} + 0x7fc0);
  }
  // Rounds to nearest even at bit 13 and lowers the exponent's bias by 112.
  static U narrow(F x, Half) {
    const U bits = as_bits(x);
    const U sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    // A subnormal's last place is 2^-24, that of floats from 0.5: the addition rounds there.
    const U subnormal = as_bits(as_float(magnitude) + set1(0.5f)) - 0x3f000000;
    const U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const U finite = magnitude < (113u << 23) ? subnormal : normal;
    const U overflow = magnitude > 0x7f800000 ? (U{} + 0x7e00) : (U{} + 0x7c00);
    return (magnitude >= 0x477ff000 ? overflow : finite) | sign;
  }

  static F as_float(U x) {
    F f;
    memcpy(&f, &x, sizeof f);
    return f;
  }
  static U as_bits(F x) {
    U u;
    memcpy(&u, &x, sizeof u);
    return u;
  }
};
