// The kernels' own sources, compiled for the emulated device.
#include "cuda/kernels.cu"
#include "cuda/append.cu"
#include "cuda/decode/decode_kernel.h"
#include "cuda/launch.cu"
#include "cuda/merge_states.cu"

namespace lean::cuda {

#define LEAN_DECODE_KERNEL(...)                \
  LEAN_DEFINE_DECODE_KERNEL(Half, __VA_ARGS__) \
  LEAN_DEFINE_DECODE_KERNEL(BFloat16, __VA_ARGS__)
#include "cuda/decode/kernel_list.h"

}  // namespace lean::cuda
