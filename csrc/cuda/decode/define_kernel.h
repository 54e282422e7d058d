// The definition of one kernel, for an object of its own.
#pragma once

#include "cuda/decode/decode_kernel.h"
#include "cuda/decode/kernels.h"

namespace lean::cuda {

template <class Config>
Kernel make_kernel() {
  static std::atomic<int64_t> resident_ctas[kMaxDevices];
  return {Config::head_dim,       Config::head_dim_v,
          Config::rows,           Config::quantised,
          Config::tile_tokens,    shared_bytes<Config>(),
          Config::partial_floats, kWarps * (Config::slots - 1) * Config::slot_bytes,
          &decode_kernel<Config>, resident_ctas};
}

#define LEAN_DEFINE_DECODE_KERNEL(T, dims, dims_v, row_tiles, bytes)       \
  Kernel decode_kernel_##T##_##dims##_##dims_v##_##row_tiles##_##bytes() { \
    return make_kernel<Config<hw::T, dims, dims_v, row_tiles, bytes>>();   \
  }

}  // namespace lean::cuda
