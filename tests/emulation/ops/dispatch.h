// The emulated device's in place of csrc/ops/dispatch.h: CPU tensors go through the CUDA backend.
#pragma once

#include "cuda/backend.h"
#include "ops/tensor_args.h"

#define LEAN_OP_LIBRARY lean_attn_emulated

namespace lean {

template <class Call>
void dispatch(const Argument& argument, const Call& call) {
  DeviceMemory memory(argument.tensor);
  call(cuda::kBackend, Queue{0, nullptr, [&](int64_t bytes) { return memory.allocate(bytes); }});
}

}  // namespace lean
