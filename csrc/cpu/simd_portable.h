// Vectors of 8 floats in GCC's vector extension, which any target compiles (to NEON on Arm). See
// simd_avx512.h for the meaning of the operations.

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kStripRows = 4;
  typedef float F __attribute__((vector_size(32), aligned(4)));
  typedef int32_t I __attribute__((vector_size(32), aligned(4)));
  typedef uint32_t U __attribute__((vector_size(32), aligned(4)));
  typedef uint16_t U16 __attribute__((vector_size(16), aligned(2)));

  struct Pair {
    F a, b;
  };

  static F zero() { return F{}; }
  static F set1(float x) { return F{x, x, x, x, x, x, x, x}; }
  static F load(const float* p) { return *reinterpret_cast<const F*>(p); }
  static void store(float* p, F x) { memcpy(p, &x, sizeof x); }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F where_between(F i, F begin, F end, F x, F other) { return ((i >= begin) & (i < end)) ? x : other; }
  static F zero_where_minus_infinity(F x) { return x == set1(kMinusInfinity) ? zero() : x; }
  // Adding 1.5 * 2^23 leaves a whole number in the low bits, for |x| < 2^22.
  static F round(F x) {
    const F magic = set1(12582912.0f);
    return (x + magic) - magic;
  }
  static F scale_by_power(F x, F n) {
    const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
    F power;
    memcpy(&power, &exponent, sizeof power);
    return x * power;
  }

  template <int period>
  static F replicate(const float* p) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = p[i % period];
    return x;
  }

  template <int period, F (*op)(F, F)>
  static F fold(F x) {
    if constexpr (period <= 4) x = op(x, shuffle<4, 5, 6, 7, 0, 1, 2, 3>(x, x));
    if constexpr (period <= 2) x = op(x, shuffle<2, 3, 0, 1, 6, 7, 4, 5>(x, x));
    if constexpr (period <= 1) x = op(x, shuffle<1, 0, 3, 2, 5, 4, 7, 6>(x, x));
    return x;
  }

  static F sum_halves(const F (&x)[4]) {
    F pairs[2];
    for (int i = 0; i < 2; ++i) {
      pairs[i] = shuffle<0, 8, 2, 10, 4, 12, 6, 14>(x[2 * i], x[2 * i + 1]) +
                 shuffle<1, 9, 3, 11, 5, 13, 7, 15>(x[2 * i], x[2 * i + 1]);
    }
    return shuffle<0, 1, 8, 9, 4, 5, 12, 13>(pairs[0], pairs[1]) +
           shuffle<2, 3, 10, 11, 6, 7, 14, 15>(pairs[0], pairs[1]);
  }

  static F load_twice(const float* p) { return F{p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]}; }
  static void store_lower(float* p, F x) { memcpy(p, &x, sizeof x / 2); }

  template <class T>
  static Pair load_halves(const T* lower, const T* upper) {
    const F x = widen(lower), y = widen(upper);
    return {shuffle<0, 1, 2, 3, 8, 9, 10, 11>(x, y), shuffle<4, 5, 6, 7, 12, 13, 14, 15>(x, y)};
  }
  // With 8 columns there is never a tail.
  template <class T>
  static Pair load_halves_tail(const T*, const T*, int) {
    return {zero(), zero()};
  }

  template <class T>
  static Pair load_pair(const T* p) {
    return {widen(p), widen(p + 8)};
  }
  // With chunks of 16 columns a tail is always 8.
  template <class T>
  static Pair load_pair_tail(const T* p, int) {
    return {widen(p), zero()};
  }
  template <class T>
  static void store_pair_tail(T* p, int columns, F a, F b) {
    narrow(p, a);
    if (columns == 16) narrow(p + 8, b);
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

  static F widen(const float* p) { return load(p); }
  static F widen(const BFloat16* p) { return as_float(load_u16(p) << 16); }
  // Shifts the fp16 bits to where fp32 has them and multiplies by 2^112, the difference of the
  // exponents' biases, which makes subnormals right; infinity and NaN get the largest exponent
  // back.
  static F widen(const Half* p) {
    const U bits = load_u16(p);
    const U magnitude = (bits & 0x7fff) << 13;
    const F scaled = as_float(magnitude) * set1(0x1p112f);
    const U special = (U)((bits & 0x7c00) == 0x7c00);
    return as_float(as_bits(scaled) | (special & 0x7f800000) | ((bits & 0x8000) << 16));
  }
  static void narrow(float* p, F x) { store(p, x); }
  static void narrow(BFloat16* p, F x) {
    const U bits = as_bits(x);
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store_u16(p, (U)(x == x) ? rounded : (U{} + 0x7fc0));
  }
  // Rounds to nearest even at bit 13 and lowers the exponent's bias by 112.
  static void narrow(Half* p, F x) {
    const U bits = as_bits(x);
    const U sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    // A subnormal's last place is 2^-24, that of floats from 0.5: the addition rounds there.
    const F small = as_float(magnitude) + set1(0.5f);
    const U subnormal = as_bits(small) - 0x3f000000;
    const U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const U finite = (U)(magnitude < (113u << 23)) ? subnormal : normal;
    const U overflow = (U)(magnitude > 0x7f800000) ? (U{} + 0x7e00) : (U{} + 0x7c00);
    store_u16(p, ((U)(magnitude >= 0x477ff000) ? overflow : finite) | sign);
  }

  template <class T>
  static U load_u16(const T* p) {
    U16 x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, U);
  }
  template <class T>
  static void store_u16(T* p, U x) {
    const U16 narrow = __builtin_convertvector(x, U16);
    memcpy(p, &narrow, sizeof narrow);
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
