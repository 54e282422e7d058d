// Integer arithmetic that every backend shares: one text for host and device.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define LEAN_HOST_DEVICE __host__ __device__
// Before a loop that is rarely long: nvcc would make four copies of it.
#define LEAN_ROLLED _Pragma("unroll 1")
#else
#define LEAN_HOST_DEVICE
#define LEAN_ROLLED
#endif

namespace lean {

// Unlike std::min and std::max these take arguments of two types, which compare as the wider one.
template <class A, class B>
LEAN_HOST_DEVICE constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
LEAN_HOST_DEVICE constexpr std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}

template <class Int>
LEAN_HOST_DEVICE constexpr Int ceil_div(Int a, std::type_identity_t<Int> b) {
  return (a + b - 1) / b;
}
LEAN_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

// A divisor of numbers from 0 to 2^31 - 1, itself one of them and not 0, that divides by a multiplication
// (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994).
class FastDivisor {
 public:
  FastDivisor() = default;
  explicit constexpr FastDivisor(int32_t divisor) : divisor_(divisor) {
    if (divisor == 1) return;
    int bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    multiplier_ = static_cast<uint32_t>((((uint64_t{1} << (31 + bits)) - 1) / divisor) + 1);
    shift_ = bits - 1;
  }

  LEAN_HOST_DEVICE constexpr operator int32_t() const { return divisor_; }
  friend LEAN_HOST_DEVICE constexpr int32_t operator/(int32_t n, const FastDivisor& d) {
    return d.divisor_ == 1
               ? n
               : static_cast<int32_t>(uint64_t{static_cast<uint32_t>(n)} * d.multiplier_ >> 32 >> d.shift_);
  }

 private:
  int32_t divisor_ = 1;
  uint32_t multiplier_ = 0;
  int32_t shift_ = 0;
};

}  // namespace lean
