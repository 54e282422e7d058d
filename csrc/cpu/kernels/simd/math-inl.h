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

// tanh to some 3e-7 relative, also near 0: with e = e^(-2|x|) - 1, summed so that nothing cancels, its
// magnitude is -e / (2 + e).
inline Simd::F tanh(Simd::F x) {
  using S = Simd;
  const S::F y = S::max(S::set1(-127.0f), S::mul(S::abs(x), S::set1(-2.0f * kLog2e)));
  const S::F n = S::round(y);
  const S::F f = S::sub(y, n);
  const S::F power = S::scale_by_power(S::set1(1.0f), n);
  const S::F e = S::fma(S::mul(power, f), exp2_slope(f), S::sub(power, S::set1(1.0f)));
  return S::copy_sign(S::div(e, S::add(e, S::set1(2.0f))), x);
}

// Calls `take` with 0 to n - 1, each a constant to the compiler: what it does with arrays stays in registers.
template <int n, class Take>
LEAN_INLINE inline void unrolled(const Take& take) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      LEAN_INLINE { (take(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, n>{});
}
