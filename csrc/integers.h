// Integer arithmetic that every backend shares: one text for host and device.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define LEAN_HOST_DEVICE __host__ __device__
#else
#define LEAN_HOST_DEVICE
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

LEAN_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
LEAN_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace lean
