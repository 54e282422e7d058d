// A CUDA runtime that runs nothing: it records its calls, and fails where it is told to.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorUnknown = 999 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
using cudaStream_t = struct CUstream_st*;
struct dim3 {
  explicit dim3(unsigned x) : x(x) {}
  unsigned x;
};

namespace fake {

struct Call {
  std::string name;
  std::vector<int64_t> numbers;
};

struct Runtime {
  int attributes[3] = {132, 9, 0};  // by cudaDeviceAttr
  int ctas_per_sm = 2;
  std::string failing;  // the call of this name fails
  std::vector<Call> calls;
  std::function<void(void** arguments)> on_launch = [](void**) {};
  std::mutex mutex;

  cudaError_t record(const char* name, std::vector<int64_t> numbers) {
    const std::lock_guard lock(mutex);
    calls.push_back({name, std::move(numbers)});
    return failing == name ? cudaErrorUnknown : cudaSuccess;
  }
};

inline Runtime runtime;

inline int64_t number_of(const void* address) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
}

}  // namespace fake

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorUnknown ? "unknown error" : "invalid configuration argument";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = fake::runtime.attributes[attribute];
  return fake::runtime.record("cudaDeviceGetAttribute", {attribute, device});
}
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return fake::runtime.record("cudaFuncSetAttribute", {fake::number_of(function), attribute, value});
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, const void* function, int threads,
                                                                 size_t shared_bytes) {
  *ctas = fake::runtime.ctas_per_sm;
  return fake::runtime.record("cudaOccupancyMaxActiveBlocksPerMultiprocessor",
                              {fake::number_of(function), threads, static_cast<int64_t>(shared_bytes)});
}
template <class V>
cudaError_t cudaGetSymbolAddress(void** address, V& symbol) {
  *address = &symbol;
  return fake::runtime.record("cudaGetSymbolAddress", {});
}
inline cudaError_t cudaDeviceSynchronize() {
  return fake::runtime.record("cudaDeviceSynchronize", {});
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return fake::runtime.record("cudaMemcpy", {static_cast<int64_t>(bytes)});
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return fake::runtime.record("cudaMemset", {static_cast<int64_t>(bytes)});
}
inline cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                    size_t shared_bytes, cudaStream_t stream) {
  fake::runtime.on_launch(arguments);
  const cudaError_t error =
      fake::runtime.record("cudaLaunchKernel", {fake::number_of(function), grid.x, block.x,
                                                static_cast<int64_t>(shared_bytes), fake::number_of(stream)});
  return grid.x == 0 ? cudaErrorInvalidConfiguration : error;
}
