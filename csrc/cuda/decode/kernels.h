// The compiled kernels: one table per dtype, each in a translation unit of its own so that they compile side
// by side. nvcc 13.0 takes some 17 s and 0.7 GB per table and architecture.
#pragma once

#include <atomic>
#include <span>

#include "cuda/decode/decode_kernel.h"

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

std::span<const Kernel> kernels_fp16();
std::span<const Kernel> kernels_bf16();

inline std::span<const Kernel> kernels_of(DType dtype) {
  return dtype == DType::float16 ? kernels_fp16() : kernels_bf16();
}

template <class Config>
Kernel make_kernel() {
  static std::atomic<int64_t> resident_ctas[kMaxDevices];
  return {Config::head_dim,       Config::head_dim_v,
          Config::rows,           Config::quantised,
          Config::tile_tokens,    shared_bytes<Config>(),
          Config::partial_floats, kWarps * (Config::slots - 1) * Config::slot_bytes,
          &decode_kernel<Config>, resident_ctas};
}

// Every head_dim that models use, exactly; others go through the next larger one. Two row tiles where the
// registers hold them.
template <class T>
std::span<const Kernel> kernel_table() {
  static const Kernel kernels[] = {
      make_kernel<Config<T, 64, 64, 1>>(),
      make_kernel<Config<T, 64, 64, 2>>(),
      make_kernel<Config<T, 80, 80, 1>>(),
      make_kernel<Config<T, 80, 80, 2>>(),
      make_kernel<Config<T, 96, 96, 1>>(),
      make_kernel<Config<T, 96, 96, 2>>(),
      make_kernel<Config<T, 128, 128, 1>>(),
      make_kernel<Config<T, 128, 128, 2>>(),
      make_kernel<Config<T, 192, 128, 1>>(),
      make_kernel<Config<T, 192, 192, 1>>(),
      make_kernel<Config<T, 256, 256, 1>>(),
      make_kernel<Config<T, 512, 512, 1>>(),
      // Quantised caches.
      make_kernel<Config<T, 64, 64, 1, 1>>(),
      make_kernel<Config<T, 128, 128, 1, 1>>(),
      make_kernel<Config<T, 256, 256, 1, 1>>(),
      make_kernel<Config<T, 512, 512, 1, 1>>(),
  };
  return kernels;
}

}  // namespace lean::cuda
