// The CUDA backend, as the op sees it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "append.h"
#include "params.h"

namespace lean::cuda {

// Queues the decode on `stream` of `device`, the current one. `allocate(bytes)` returns device memory,
// 16-byte aligned, that stays until the launch is done. Throws std::runtime_error where the device cannot run
// it.
void decode(const DecodeParams& params, int device, void* stream,
            const std::function<void*(int64_t)>& allocate);

// Queues the append. A token that would go outside the cache is not written.
void append_kv(const AppendParams& params, int device, void* stream);

// Queues the merge of at most so many states.
constexpr int64_t kMaxMergedStates = 128;
void merge_states(const MergeParams& params, void* stream);

// The first number out of range that kernels have met on a device since the last call: what it says, or an
// empty string. Waits for the device.
std::string take_error(int device);

// What is compiled, for inspection.
struct KernelFacts {
  DType dtype;
  int head_dim;
  int head_dim_v;
  int rows;
  bool quantised;  // caches of 8 bits per element
  int threads;
  int shared_bytes;
  int bytes_in_flight;  // of K and V, per CTA
};
std::vector<KernelFacts> kernel_facts();

}  // namespace lean::cuda
