// What warp collectives compute, from the fragment layouts of the PTX ISA manual.
#include <cstring>

#include "device.h"

namespace lean::emulation {
namespace {

template <class T>
T& argument(void* const (&arguments)[kWarpLanes], int lane) {
  return *static_cast<T*>(arguments[lane]);
}

void any(void* const (&arguments)[kWarpLanes]) {
  bool result = false;
  for (int lane = 0; lane < kWarpLanes; ++lane) result |= argument<bool>(arguments, lane);
  for (int lane = 0; lane < kWarpLanes; ++lane) argument<bool>(arguments, lane) = result;
}

void shuffle_xor(void* const (&arguments)[kWarpLanes]) {
  float values[kWarpLanes];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    values[lane] =
        argument<FloatExchange>(arguments, lane ^ argument<FloatExchange>(arguments, lane).mask).value;
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) argument<FloatExchange>(arguments, lane).value = values[lane];
}

void shuffle_up(void* const (&arguments)[kWarpLanes]) {
  int64_t values[kWarpLanes];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int from = lane - argument<IntExchange>(arguments, lane).lanes;
    values[lane] = argument<IntExchange>(arguments, from < 0 ? lane : from).value;
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) argument<IntExchange>(arguments, lane).value = values[lane];
}

void shuffle(void* const (&arguments)[kWarpLanes]) {
  int64_t values[kWarpLanes];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    values[lane] =
        argument<IntExchange>(arguments, argument<IntExchange>(arguments, lane).lanes % kWarpLanes).value;
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) argument<IntExchange>(arguments, lane).value = values[lane];
}

// ldmatrix: "each row requires eight lanes to receive it"; lane 4 r + c gets elements 2c and 2c + 1 of row r.
void load_matrices(void* const (&arguments)[kWarpLanes], bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], argument<MatrixLoad>(arguments, matrix * 8 + row).row, sizeof elements[row]);
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = transposed ? elements[t][g] : elements[g][t];
      const uint32_t high = transposed ? elements[t + 1][g] : elements[g][t + 1];
      argument<MatrixLoad>(arguments, lane).r[matrix] = low | high << 16;
    }
  }
}

// mma.m16n8k16: the manual gives, for lane with groupID g = lane / 4 and t = lane % 4,
//   A: a_i at row g (+ 8 for i in 2, 3, 6, 7), column 2t + (i & 1) (+ 8 for i >= 4)
//   B: b_i at row 2t + (i & 1) (+ 8 for i >= 2), column g
//   C: c_i at row g (+ 8 for i >= 2), column 2t + (i & 1)
void multiply_add(void* const (&arguments)[kWarpLanes]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const auto& from = argument<MatrixProduct>(arguments, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = g + (i / 2 % 2 ? 8 : 0), column = 2 * t + i % 2 + (i >= 4 ? 8 : 0);
      a[row][column] = from.to_float(static_cast<uint16_t>(from.a[i / 2] >> (i % 2 * 16)));
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] =
          from.to_float(static_cast<uint16_t>(from.b[i / 2] >> (i % 2 * 16)));
    }
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    float* c = argument<MatrixProduct>(arguments, lane).c;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
      for (int k = 0; k < 16; ++k) c[i] += a[row][k] * b[k][column];
    }
  }
}

}  // namespace

void complete(Collective which, void* const (&arguments)[kWarpLanes]) {
  switch (which) {
    case Collective::sync_warp:
      return;
    case Collective::any:
      return any(arguments);
    case Collective::shuffle_xor:
      return shuffle_xor(arguments);
    case Collective::shuffle_up:
      return shuffle_up(arguments);
    case Collective::shuffle:
      return shuffle(arguments);
    case Collective::load_matrices:
      return load_matrices(arguments, false);
    case Collective::load_transposed:
      return load_matrices(arguments, true);
    case Collective::multiply_add:
      return multiply_add(arguments);
  }
}

}  // namespace lean::emulation
