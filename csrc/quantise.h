// How rows are quantised: the largest magnitude becomes the largest number of the dtype. One text for all
// backends, which store the same bits; reference.quantise is its definition.
#pragma once

#include <bit>
#include <cstdint>

#include "params.h"

namespace lean {

inline constexpr int32_t kInfinityBits = 0x7f800000;

// The largest number of a quantised dtype.
LEAN_HOST_DEVICE constexpr float largest_of(DType dtype) {
  return dtype == DType::int8 ? 127.0f : dtype == DType::float8_e4m3 ? 448.0f : 57344.0f;
}

LEAN_HOST_DEVICE constexpr uint8_t one_of(DType dtype) {
  return dtype == DType::int8 ? 1 : dtype == DType::float8_e4m3 ? 0x38 : 0x3c;
}

// The bits of |x|. They are in the order of the magnitudes, and from kInfinityBits on x is not finite.
LEAN_HOST_DEVICE constexpr int32_t magnitude_bits(float x) {
  return std::bit_cast<int32_t>(x) & 0x7fffffff;
}

LEAN_HOST_DEVICE constexpr int32_t clamped(int32_t x, int32_t low, int32_t high) {
  const int32_t raised = x < low ? low : x;
  return raised > high ? high : raised;
}

// The multiple of a power of 2 that is nearest to x, of two the even one. The power is given by its bits.
// |x| < 2^22 steps
LEAN_HOST_DEVICE constexpr int32_t steps_in(float x, int32_t step) {
  // Floats from 2^23 steps on are whole steps, and their bits count them.
  const int32_t shift = step + (23 << 23 | 1 << 22);
  return std::bit_cast<int32_t>(x + std::bit_cast<float>(shift)) - shift;
}

// What a row is divided by, from its largest magnitude. NaN where it is not finite; 0 where it is too small
// to be told from 0.
template <class Numbers>
LEAN_HOST_DEVICE float scale_of_row(DType dtype, int32_t largest_magnitude) {
  return largest_magnitude >= kInfinityBits
             ? std::bit_cast<float>(0x7fc00000u)
             : Numbers::divide(std::bit_cast<float>(largest_magnitude), largest_of(dtype));
}

// An element of a row, by the row's scale, which is above 0: the quotient, rounded to the nearest number of
// the dtype, ties to even. A subnormal scale is inexact, so that quotients may be too large; they become the
// largest number. (There is nothing to branch on, and compilers make vectors of it.)
template <class Numbers, DType kDType>
LEAN_HOST_DEVICE uint8_t quantised(float x, float scale) {
  const float quotient = Numbers::divide(x, scale);
  if constexpr (kDType == DType::int8) {
    return static_cast<uint8_t>(clamped(steps_in(quotient, std::bit_cast<int32_t>(1.0f)), -127, 127));
  } else {
    constexpr int kMantissaBits = kDType == DType::float8_e4m3 ? 3 : 2;
    constexpr int kBias = kDType == DType::float8_e4m3 ? 7 : 15;
    constexpr int32_t kSmallestNormal = (127 - kBias + 1) << 23;
    const int32_t magnitude =
        clamped(magnitude_bits(quotient), 0, std::bit_cast<int32_t>(largest_of(kDType)));
    // Steps of subnormal numbers are those of the smallest normal one. One step too many is the next
    // exponent's first.
    const int32_t exponent = clamped(magnitude & kInfinityBits, kSmallestNormal, kInfinityBits);
    const int32_t steps = steps_in(std::bit_cast<float>(magnitude), exponent - (kMantissaBits << 23));
    const int32_t sign = std::bit_cast<int32_t>(quotient) >> 24 & 0x80;
    return static_cast<uint8_t>(sign | (((exponent - kSmallestNormal) >> (23 - kMantissaBits)) + steps));
  }
}

// All elements of a row whose scale is not above 0: zeros, and ones where it is NaN.
LEAN_HOST_DEVICE constexpr uint8_t filling_of(DType dtype, float scale) {
  return scale == 0.0f ? 0 : one_of(dtype);
}

}  // namespace lean
