// Which backend an op runs on.
#pragma once

#include "arguments.h"

#if defined(LEAN_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
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

// Calls on_cpu(), or on_cuda(device, stream), for tensors that are where `argument` is.
template <class OnCpu, class OnCuda>
void dispatch(const Argument& argument, const OnCpu& on_cpu, const OnCuda& on_cuda) {
#if defined(LEAN_EMULATED)
  (void)on_cpu;
  on_cuda(0, nullptr);
#else
  if (argument.tensor.is_cpu()) return on_cpu();
#if defined(LEAN_WITH_CUDA)
  const int device = argument.tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  on_cuda(device, current_cuda_stream(argument.op, device));
#else
  (void)on_cuda;
  fail(argument.op, ": ", argument.name, " is on ", device_of(argument.tensor),
       "; this build of lean_attention runs on cpu only (built without CUDA: no toolkit was found, or "
       "LEAN_ATTENTION_CUDA=0)");
#endif
#endif
}

}  // namespace lean
