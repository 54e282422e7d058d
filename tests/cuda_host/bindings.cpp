// The launches of csrc/cuda and the dispatch of csrc/ops, as tests call them and see what they did.
#define LEAN_WITH_CUDA
// First, with the <dlfcn.h> of this folder: pybind11 may include the system's.
#include "ops/dispatch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <thread>

#include "cuda/append.cu"
#include "cuda/launch.cu"
#include "cuda/merge_states.cu"

namespace py = pybind11;
using namespace lean;
using fake::runtime;

namespace {

constexpr int kSharedBytes = 70'000, kPartialFloats = 16 * (128 + 2) + 5;

// Of every tensor, as dispatch sees it.
int device_of_tensors = 0;

std::atomic<int64_t> resident_ctas[3][cuda::kMaxDevices];

void no_kernel(cuda::DecodeArguments) {}
void no_kernel_of_32_rows(cuda::DecodeArguments) {}
void no_quantised_kernel(cuda::DecodeArguments) {}

cuda::Kernel kernel(int head_dim, int rows, bool quantised, int shared_bytes,
                    void (*function)(cuda::DecodeArguments), std::atomic<int64_t>* resident) {
  return {.head_dim = head_dim,
          .head_dim_v = head_dim,
          .rows = rows,
          .quantised = quantised,
          .tile_tokens = 128,
          .shared_bytes = shared_bytes,
          .partial_floats = kPartialFloats,
          .bytes_in_flight = 0,
          .function = function,
          .resident_ctas = resident};
}

const cuda::Kernel kKernels[] = {
    kernel(128, 16, false, kSharedBytes, &no_kernel, resident_ctas[0]),
    kernel(128, 32, false, 2 * kSharedBytes, &no_kernel_of_32_rows, resident_ctas[1]),
    kernel(64, 16, true, kSharedBytes, &no_quantised_kernel, resident_ctas[2]),
};

// What a launch of this thread was given.
thread_local cuda::DecodeArguments launched;

struct Call {
  int device = 0;
  int64_t stream = 0;
  int64_t batch = 2, heads = 8, kv_heads = 2, q_len = 1, tokens = 1024, head_dim = 128, num_ctas = 0;
  int64_t data = 0, block_stride = 1024 * 256, token_stride = 256, head_stride = 128;
  bool quantised = false;
};

void run(const Call& c, const Backend& backend, const Queue& queue) {
  DecodeParams p{};
  p.k = p.v = {reinterpret_cast<const void*>(c.data),
               c.quantised ? DType::int8 : DType::bfloat16,
               c.head_dim,
               c.block_stride,
               c.token_stride,
               c.head_stride,
               {}};
  p.pages = {{}, {}, c.batch, c.tokens, 1, 0, 0};
  p.dtype = p.out_dtype = DType::bfloat16;
  p.batch = c.batch;
  p.query_tokens = c.q_len;
  p.num_heads = c.heads;
  p.num_kv_heads = c.kv_heads;
  p.visibility = {-1, -1};
  p.num_ctas = c.num_ctas;
  backend.decode(p, queue);
}

// Where the parts of the workspace lie in it, and what else the kernel is given.
py::dict decode(const Call& c) {
  alignas(128) static char memory[128];  // nothing is written there
  int64_t bytes = 0;
  const auto allocate = [&](int64_t wanted) -> void* {
    bytes = wanted;
    return memory;
  };
  run(c, cuda::kBackend, Queue{c.device, reinterpret_cast<void*>(c.stream), allocate});
  const cuda::Workspace& w = launched.workspace;
  const auto offset = [](const void* part) { return static_cast<const char*>(part) - memory; };
  return py::dict(py::arg("ticket") = offset(w.ticket), py::arg("flags") = offset(w.flags),
                  py::arg("partials") = offset(w.partials), py::arg("partial_floats") = w.partial_floats,
                  py::arg("bytes") = bytes, py::arg("nonce") = w.nonce,
                  py::arg("aligned") = launched.whole_steps,
                  py::arg("min_tiles_per_cta") = int32_t{launched.min_tiles_per_cta});
}

std::vector<uint64_t> nonces(int threads, int launches) {
  std::vector<uint64_t> found(threads * launches);
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      static char memory[128];
      for (int i = 0; i < launches; ++i) {
        run({}, cuda::kBackend, Queue{0, nullptr, [](int64_t) -> void* { return memory; }});
        found[t * launches + i] = launched.workspace.nonce;
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  return found;
}

}  // namespace

namespace lean::cuda {
std::span<const Kernel> kernels_of(DType) {
  return kKernels;
}

}  // namespace lean::cuda

// dispatch has the CPU's functions too; no tensor here is on it.
namespace lean::cpu {
void decode(const DecodeParams&) {}
void append_kv(const AppendParams&) {}
void merge_states(const MergeParams&) {}
}  // namespace lean::cpu

// What dispatch asks torch: in place of libtorch's, and recorded like the runtime's calls.
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = device_of_tensors;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  static char made;
  *guard = reinterpret_cast<DeviceGuardHandle>(&made);
  runtime.record("guard", {device});
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  runtime.record("end of guard", {});
  return 0;
}
int32_t current_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(int64_t{1000} + device);
  return runtime.record("current_stream", {device}) == cudaSuccess ? 0 : 1;
}

PYBIND11_MODULE(lean_attention_cuda_host, m) {
  py::class_<Call> call(m, "Call");
  call.def(py::init<>());
#define FIELD(name) call.def_readwrite(#name, &Call::name)
  FIELD(device), FIELD(stream), FIELD(batch), FIELD(heads), FIELD(kv_heads), FIELD(q_len), FIELD(tokens);
  FIELD(head_dim), FIELD(num_ctas), FIELD(data), FIELD(block_stride), FIELD(token_stride);
  FIELD(head_stride), FIELD(quantised);
#undef FIELD
  // Forgets the calls and what is known of devices; the call named `failing` fails from here on.
  m.def(
      "reset",
      [](int sms, int major, int minor, int ctas_per_sm, const std::string& failing) {
        runtime.attributes[cudaDevAttrMultiProcessorCount] = sms;
        runtime.attributes[cudaDevAttrComputeCapabilityMajor] = major;
        runtime.attributes[cudaDevAttrComputeCapabilityMinor] = minor;
        runtime.ctas_per_sm = ctas_per_sm;
        runtime.failing = failing;
        runtime.calls.clear();
        runtime.on_launch = [](void** arguments) {
          launched = *static_cast<const cuda::DecodeArguments*>(arguments[0]);
        };
        for (auto& of_kernel : resident_ctas) {
          for (auto& of_device : of_kernel) of_device = 0;
        }
      },
      py::kw_only(), py::arg("sms") = 132, py::arg("major") = 9, py::arg("minor") = 0,
      py::arg("ctas_per_sm") = 2, py::arg("failing") = "");
  m.def("calls", [] {
    std::vector<std::pair<std::string, std::vector<int64_t>>> calls;
    for (const fake::Call& c : runtime.calls) calls.emplace_back(c.name, c.numbers);
    return calls;
  });
  m.def("decode", &decode);
  m.def("nonces", &nonces);
  // A call of an op, for tensors of the call's device.
  m.def("dispatch", [](const Call& c) {
    device_of_tensors = c.device;
    const Tensor tensor;
    dispatch({"decode", "q", tensor}, [&](const Backend& backend, const Queue& queue) {
      static char memory[128];
      run(c, backend, Queue{queue.device, queue.stream, [](int64_t) -> void* { return memory; }});
    });
  });
  m.def("append_kv", [](int64_t tokens, bool quantised, int device, int64_t stream) {
    AppendParams p{};
    p.dtype = DType::bfloat16;
    p.k_cache.dtype = p.v_cache.dtype = quantised ? DType::int8 : DType::bfloat16;
    p.batch = 1;
    p.tokens = tokens;
    p.num_kv_heads = 2;
    runtime.on_launch = [](void**) {};
    cuda::append_kv(p, Queue{device, reinterpret_cast<void*>(stream), {}});
  });
  m.def("merge_states", [](int64_t num_states, int64_t rows, int64_t stream) {
    const std::vector<const void*> outs(num_states);
    const std::vector<const float*> lses(num_states);
    MergeParams p{};
    p.outs = outs.data();
    p.lses = lses.data();
    p.dtype = p.out_dtype = DType::bfloat16;
    p.num_states = num_states;
    p.batch = rows;
    p.q_len = p.num_heads = p.head_dim_v = 1;
    runtime.on_launch = [](void**) {};
    cuda::merge_states(p, Queue{0, reinterpret_cast<void*>(stream), {}});
  });
  // As a kernel does that meets a sequence of 51 tokens where there may be 50.
  m.def("report", [](int device) {
    cuda::ErrorRecord& record = *cuda::error_record_of(device);
    ++record.reports;
    record.first = {.kind = BadNumber::length, .value = 51, .most = 50};
  });
  m.def("take_error", &cuda::take_error);
}
