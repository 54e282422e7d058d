// The CUDA backend, as the ops see it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend_interface.h"

namespace lean::cuda {

// Each queues its work. They throw std::invalid_argument where there is no kernel for a call, and
// std::runtime_error where the device cannot run it.
void decode(const DecodeParams& params, const Queue& queue);
void append_kv(const AppendParams& params, const Queue& queue);  // a token outside the cache is not written
void merge_states(const MergeParams& params, const Queue& queue);

inline constexpr Backend kBackend{.decode = decode, .append_kv = append_kv, .merge_states = merge_states};

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
