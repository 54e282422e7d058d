// One kernel by itself.
#include "cuda/decode/decode_kernel.h"

namespace lean::cuda {

template LEAN_KERNEL(kThreads, 2)
    decode_kernel<Config<hw::BFloat16, 128, 128, 1>>(LEAN_KERNEL_PARAMETER DecodeArguments);

}  // namespace lean::cuda
