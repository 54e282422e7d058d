#include "cuda/decode/kernels.h"

namespace lean::cuda {

std::span<const Kernel> kernels_bf16() {
  return kernel_table<hw::BFloat16>();
}

}  // namespace lean::cuda
