#include "cuda/decode/kernels.h"

namespace lean::cuda {

std::span<const Kernel> kernels_fp16() {
  return kernel_table<hw::Half>();
}

}  // namespace lean::cuda
