// The table of the decode kernels, of which each is an object of its own.
#include "cuda/decode/arguments.h"

namespace lean::cuda {

#define LEAN_DECODE_KERNEL(dims, dims_v, row_tiles, bytes)               \
  Kernel decode_kernel_Half_##dims##_##dims_v##_##row_tiles##_##bytes(); \
  Kernel decode_kernel_BFloat16_##dims##_##dims_v##_##row_tiles##_##bytes();
#include "cuda/decode/kernel_list.h"
#undef LEAN_DECODE_KERNEL

std::span<const Kernel> kernels_of(DType dtype) {
#define LEAN_DECODE_KERNEL(dims, dims_v, row_tiles, bytes) \
  decode_kernel_Half_##dims##_##dims_v##_##row_tiles##_##bytes(),
  static const Kernel fp16[] = {
#include "cuda/decode/kernel_list.h"
  };
#undef LEAN_DECODE_KERNEL
#define LEAN_DECODE_KERNEL(dims, dims_v, row_tiles, bytes) \
  decode_kernel_BFloat16_##dims##_##dims_v##_##row_tiles##_##bytes(),
  static const Kernel bf16[] = {
#include "cuda/decode/kernel_list.h"
  };
#undef LEAN_DECODE_KERNEL
  return dtype == DType::float16 ? std::span<const Kernel>(fp16) : std::span<const Kernel>(bf16);
}

}  // namespace lean::cuda
