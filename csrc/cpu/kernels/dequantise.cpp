// What the values of the quantised dtypes are in 16-bit ones.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/kernels/tile_kernel.h"

namespace lean::cpu {
namespace {

float value_of(DType dtype, uint8_t bits) {
  switch (dtype) {
    case DType::float8_e4m3:
      return c10::Float8_e4m3fn(bits, c10::Float8_e4m3fn::from_bits());
    case DType::float8_e5m2:
      return c10::Float8_e5m2(bits, c10::Float8_e5m2::from_bits());
    default:
      return static_cast<int8_t>(bits);
  }
}

template <class T>
DequantiseTable table_of(DType from) {
  DequantiseTable table;
  for (int bits = 0; bits < 256; ++bits) table.values[bits] = T(value_of(from, static_cast<uint8_t>(bits))).x;
  for (int bits = 0; bits < 128; ++bits) {
    table.low[bits] = static_cast<uint8_t>(table.values[bits]);
    table.high[bits] = static_cast<uint8_t>(table.values[bits] >> 8);
  }
  return table;
}

template <class T>
const DequantiseTable& kept_table(DType from) {
  static const DequantiseTable e4m3 = table_of<T>(DType::float8_e4m3), e5m2 = table_of<T>(DType::float8_e5m2),
                               int8 = table_of<T>(DType::int8);
  return from == DType::float8_e4m3 ? e4m3 : from == DType::float8_e5m2 ? e5m2 : int8;
}

}  // namespace

const DequantiseTable& dequantise_table(DType from, DType to) {
  return to == DType::float16 ? kept_table<c10::Half>(from) : kept_table<c10::BFloat16>(from);
}

}  // namespace lean::cpu
