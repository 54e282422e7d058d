// The CUDA runtime, as launches use it. tests/cuda_host compiles this for a runtime that records its calls.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lean::hw {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("lean_attention: ") + what + ": " + cudaGetErrorString(error));
  }
}

struct DeviceFacts {
  int sms;
  int capability;  // 10 * major + minor
};
inline DeviceFacts device_facts(int device) {
  int sms = 0, major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "reading the number of SMs");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "reading the capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "reading the capability");
  return {sms, 10 * major + minor};
}

// CTAs of the kernel that an SM of the current device holds; allows it its shared memory. The occupancy
// counts on the largest share of L1 as shared memory, which the driver gives to kernels that ask for it.
template <class Arguments>
int ctas_per_sm(void (*kernel)(Arguments), int threads, int shared_bytes) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "allowing the kernel its shared memory");
  check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "asking for the largest shared memory");
  int ctas = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, function, threads, shared_bytes),
        "reading the occupancy");
  return ctas;
}

// Where a device variable lies on the current device.
template <class V>
V* device_address(V& variable) {
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, variable), "finding a device variable");
  return static_cast<V*>(address);
}

// The value of a device variable once all work of the current device is done; zeros take its place before
// this returns. They are written on the legacy stream, which torch's side streams do not wait for.
template <class V>
V take_value(V* variable) {
  V value;
  check(cudaDeviceSynchronize(), "waiting for the device");
  check(cudaMemcpy(&value, variable, sizeof value, cudaMemcpyDeviceToHost), "reading a device variable");
  check(cudaMemset(variable, 0, sizeof value), "clearing a device variable");
  check(cudaDeviceSynchronize(), "waiting for the device");
  return value;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), Arguments arguments, int64_t ctas, int threads, int shared_bytes,
            void* stream) {
  void* pointers[] = {&arguments};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(ctas)),
                         dim3(threads), pointers, shared_bytes, static_cast<cudaStream_t>(stream)),
        "launching the kernel");
}

// `allocate` has memory that the stream of the launch may use until the op returns.
template <class Allocate>
void* allocate_workspace(const Allocate& allocate, int64_t bytes) {
  return allocate(bytes);
}

}  // namespace lean::hw
