// Which backend an op runs on: that of the device where its tensors are.
//
// tests/emulation has another dispatch.h, under a library name of its own.
#pragma once

#include "cpu/backend.h"
#include "ops/library.h"
#include "ops/tensor_args.h"

#if defined(LEAN_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/backend.h"
#endif

namespace lean {

#if defined(LEAN_WITH_CUDA)
// Looked up in the library that has it: this one also loads beside a torch without CUDA.
inline void* current_cuda_stream(const char* op, int device) {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto current_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (current_stream == nullptr || current_stream(device, &stream) != 0) {
    throw std::runtime_error(std::string(op) + ": this torch gives no current CUDA stream");
  }
  return stream;
}
#endif

// Calls call(backend, queue) for tensors that are where `argument` is.
template <class Call>
void dispatch(const Argument& argument, const Call& call) {
  if (argument.tensor.is_cpu()) return call(cpu::kBackend, Queue{});
#if defined(LEAN_WITH_CUDA)
  const int device = argument.tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  DeviceMemory memory(argument.tensor);
  call(cuda::kBackend, Queue{device, current_cuda_stream(argument.op, device),
                             [&](int64_t bytes) { return memory.allocate(bytes); }});
#else
  fail(argument.op, ": ", argument.name, " is on ", device_of(argument.tensor),
       "; this build of lean_attention runs on cpu only (built without CUDA: no toolkit was found, or "
       "LEAN_ATTENTION_CUDA=0)");
#endif
}

}  // namespace lean
