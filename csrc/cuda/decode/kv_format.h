// Fragments of K and V as tensor cores take them, from panels in shared memory.
//
// Of 16-bit rows ldmatrix makes them. Quantised rows are read by the same instruction, which then sees pairs
// of elements as one, and are converted to T in registers. That leaves their dims in another order: a lane
// has dims 4 t to 4 t + 3 of a row of K where 16-bit rows give it 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, so the
// query rows are laid in shared memory in that order too (rows.h); and columns g of two neighbouring output
// tiles are dims 2 g and 2 g + 1 of 16, which lay_output puts right (reduce.h). Scales are applied to
// scores and weights.
#pragma once

#include "cuda/decode/config.h"

namespace lean::cuda {

// What hw::e4m3_to_fp16 does, for chips without it.
LEAN_DEVICE void e4m3_to_fp16(uint32_t word, uint32_t& low, uint32_t& high) {
  const auto convert = [](uint32_t upper) {  // numbers in the upper bytes
    // Sign, exponent and mantissa take their places, and 2^8 makes up for the exponent's bias. A magnitude of
    // all ones comes out as 480; the one bit of its exponent that is not set makes it NaN.
    const uint32_t magnitude = upper & 0x7f007f00u, nan = (magnitude + 0x01000100u) & 0x80008000u;
    return hw::multiply_pairs((upper & 0x80008000u) | magnitude >> 1, 0x5c005c00u) | nan >> 2;
  };
  low = convert(hw::permute_bytes(word, 0, 0x1404));
  high = convert(hw::permute_bytes(word, 0, 0x3424));
}

// The four elements of a word as two pairs of T, unscaled. Exact: bf16 and fp16 hold all of them.
template <class T, DType from>
LEAN_DEVICE void dequantise(uint32_t word, uint32_t& low, uint32_t& high) {
  constexpr bool half = std::is_same_v<T, hw::Half>;
  if constexpr (from == DType::int8 && half) {
    // 1024 + 128 + x as an fp16 number, whose low byte is that of 128 + x.
    const uint32_t biased = word ^ 0x80808080u;
    low = hw::subtract_pairs<T>(hw::permute_bytes(biased, 0x64646464u, 0x4140), 0x64806480u);
    high = hw::subtract_pairs<T>(hw::permute_bytes(biased, 0x64646464u, 0x4342), 0x64806480u);
  } else if constexpr (from == DType::int8) {
    // 128 and the low seven bits as a bf16 number, less 128, or 256 where x is negative: its top bit in the
    // exponent.
    const auto convert = [](uint32_t pair) {
      return hw::subtract_pairs<T>(pair & 0xff7fff7fu, pair & 0xff80ff80u);
    };
    low = convert(hw::permute_bytes(word, 0x43434343u, 0x4140));
    high = convert(hw::permute_bytes(word, 0x43434343u, 0x4342));
  } else {
    if constexpr (from == DType::float8_e5m2) {  // it is the upper byte of fp16
      low = hw::permute_bytes(word, 0, 0x1404);
      high = hw::permute_bytes(word, 0, 0x3424);
    } else if constexpr (hw::kConvertsE4m3) {
      hw::e4m3_to_fp16(word, low, high);
    } else {
      e4m3_to_fp16(word, low, high);
    }
    if constexpr (!half) {
      low = hw::fp16_to_bf16(low);
      high = hw::fp16_to_bf16(high);
    }
  }
}

// A lane's part of 16 tokens by 32 dims of a panel: for two times 16 dims, K of the tokens 0-7 and 8-15, as
// the two halves of the k of a product.
template <class Config, DType format>
struct KeyFragments {
  using Rows = typename Config::KPanels::Rows;
  static constexpr int kDims = Config::quantised ? 32 : 16;
  uint32_t b[kDims / 16][2][2];  // [16 dims][8 tokens][half of k]

  // Where in a panel the lane's row begins.
  static LEAN_DEVICE int lane_offset(int lane) {
    return Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  LEAN_DEVICE explicit KeyFragments(const char* at) {
    uint32_t r[4];
    hw::load_matrices(r, at);
    if constexpr (Config::quantised) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dequantise<typename Config::T, format>(r[i], b[i % 2][i / 2][0], b[i % 2][i / 2][1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[0][i / 2][i % 2] = r[i];
    }
  }
};

// The same of V: for each 8 columns of the output, tokens 0-7 and 8-15.
template <class Config, DType format>
struct ValueFragments {
  using Rows = typename Config::VPanels::Rows;
  static constexpr int kDims = Config::quantised ? 32 : 16;
  uint32_t b[kDims / 8][2];  // [8 columns][half of k]

  static LEAN_DEVICE int lane_offset(int lane) { return Rows::offset(lane % 16, lane / 16); }

  LEAN_DEVICE explicit ValueFragments(const char* at) {
    uint32_t r[4];
    hw::load_matrices_transposed(r, at);
    if constexpr (Config::quantised) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Bytes of two tokens' even dims, then of their odd ones.
        const uint32_t by_dim = hw::permute_bytes(r[i], 0, 0x3120);
        dequantise<typename Config::T, format>(by_dim, b[i / 2 * 2][i % 2], b[i / 2 * 2 + 1][i % 2]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
    }
  }
};

// Calls `take` with the format of the caches as a constant, by one branch.
template <class Config, class Take>
LEAN_DEVICE void with_format(DType dtype, const Take& take) {
  if constexpr (!Config::quantised) {
    take(std::integral_constant<DType, DType::float16>{});  // of no consequence
  } else if (dtype == DType::int8) {
    take(std::integral_constant<DType, DType::int8>{});
  } else if (dtype == DType::float8_e4m3) {
    take(std::integral_constant<DType, DType::float8_e4m3>{});
  } else {
    take(std::integral_constant<DType, DType::float8_e5m2>{});
  }
}

}  // namespace lean::cuda
