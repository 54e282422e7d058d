// The CUDA backend, as the op sees it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "params.h"

namespace lean::cuda {

// Queues the decode on `stream` of `device`, the current one. `allocate(bytes)` returns device memory,
// 16-byte aligned, that stays until the launch is done. Throws std::runtime_error where the device cannot run
// it.
void decode(const DecodeParams& params, int device, void* stream,
            const std::function<void*(int64_t)>& allocate);

// What is compiled, for inspection.
struct KernelFacts {
  DType dtype;
  int head_dim;
  int head_dim_v;
  int rows;
  int threads;
  int shared_bytes;
  int bytes_in_flight;  // of K and V, per CTA
};
std::vector<KernelFacts> kernel_facts();

}  // namespace lean::cuda
