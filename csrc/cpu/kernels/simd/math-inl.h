// Functions of vectors, and loops over them. Included by microkernel-inl.h, once per instruction set.

// (2^x - 1) / x on [-1/2, 1/2]; 2^x comes out to 9.2e-8 relative, minimax.
inline Simd::F exp2_slope(Simd::F x) {
  using S = Simd;
  S::F p = S::set1(1.32647272e-3f);
  p = S::fma(p, x, S::set1(9.67151269e-3f));
  p = S::fma(p, x, S::set1(5.55073374e-2f));
  p = S::fma(p, x, S::set1(2.40222421e-1f));
  return S::fma(p, x, S::set1(6.93146978e-1f));
}

// 2^x for x < 127 to 1.7e-7 relative. Exact for whole x, because rescaling rows that need none beside one
// that does must not drift. Zero below 2^-126, NaN for NaN.
inline Simd::F exp2(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-127.0f), x);
  const S::F n = S::round(x);
  const S::F f = S::sub(x, n);
  return S::scale_by_power(S::fma(exp2_slope(f), f, S::set1(1.0f)), n);
}

// The Math of score-inl.h.
struct ScoreMath : Simd {
  // tanh to some 3e-7 relative, also near 0: with e = e^(-2|x|) - 1, summed so that nothing cancels, its
  // magnitude is -e / (2 + e).
  static F tanh(F x) {
    const F y = max(set1(-127.0f), mul(abs(x), set1(-2.0f * kLog2e)));
    const F n = round(y);
    const F f = sub(y, n);
    const F power = scale_by_power(set1(1.0f), n);
    const F e = fma(mul(power, f), exp2_slope(f), sub(power, set1(1.0f)));
    return copy_sign(div(e, add(e, set1(2.0f))), x);
  }
};

// Calls `take` with 0 to n - 1, each a constant to the compiler: what it does with arrays stays in registers.
template <int n, class Take>
LEAN_INLINE inline void unrolled(const Take& take) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      LEAN_INLINE { (take(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, n>{});
}
