// The table of the compiled kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>

#include "cuda/decode/arguments.h"

namespace lean::cuda {

constexpr int kMaxDevices = 64;

struct Kernel {
  int head_dim;
  int head_dim_v;
  int rows;
  bool quantised;  // its caches
  int64_t tile_tokens;
  int shared_bytes;
  int64_t partial_floats;
  int bytes_in_flight;
  void (*function)(DecodeArguments);
  std::atomic<int64_t>* resident_ctas;  // per device; 0: not asked yet
};

std::span<const Kernel> kernels_of(DType dtype);

}  // namespace lean::cuda
