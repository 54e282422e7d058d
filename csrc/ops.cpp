// The ops: schema, argument checks, parameters, dispatch. The only file that sees torch tensors.
//
// Built on PyTorch's stable ABI, so that one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <functional>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/decode.h"
#include "cuda/decode.h"
#include "params.h"

#if defined(LEAN_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// The tests' emulated device takes CPU tensors under a name of its own.
#if defined(LEAN_EMULATED)
#define LEAN_LIBRARY lean_attn_emulated
#else
#define LEAN_LIBRARY lean_attn
#endif

namespace lean {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxHeadDim = 256;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

// A tensor argument with the names that its errors use.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  void has_shape(const char* layout, int64_t rank) const {
    if (tensor.dim() != rank) {
      fail(op, ": ", name, " has shape ", shape_of(tensor), "; it must have ", rank, " dimensions, ", layout);
    }
  }
  void has_size(int64_t dim, int64_t want, const char* what) const {
    if (tensor.size(dim) != want) {
      fail(op, ": ", name, " has shape ", shape_of(tensor), "; its dimension ", dim, " must be ", want, ", ",
           what);
    }
  }
  void has_dtype(ScalarType want, const char* why) const {
    if (tensor.scalar_type() != want) {
      fail(op, ": ", name, " is ", tensor.scalar_type(), "; it must be ", want, why);
    }
  }
  void is_on_device_of(const Argument& other) const {
    if (tensor.device() != other.tensor.device()) {
      fail(op, ": ", name, " is on ", device_of(tensor), ", ", other.name, " on ", device_of(other.tensor),
           "; they must be on the same device");
    }
  }
  void has_contiguous_rows() const {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
      fail(op, ": ", name, " has stride ", tensor.stride(last),
           " in its last dimension; it must be contiguous there");
    }
  }
};

DType dtype_of(const Argument& argument) {
  switch (argument.tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      fail(argument.op, ": ", argument.name, " is ", argument.tensor.scalar_type(),
           "; it must be Float, Half or BFloat16");
  }
}

void check_head_dim(const char* name, int64_t head_dim) {
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    fail("decode: ", name, " is ", head_dim, "; it must be a multiple of 8 from 8 to ", kMaxHeadDim);
  }
}

void check_window(const char* name, int64_t window) {
  if (window < -1) fail("decode: ", name, " is ", window, "; it must be -1 (unbounded) or at least 0");
}

// Arguments that the schema has and the kernels do not read yet.
void reject(const char* name, bool given) {
  if (given) fail("decode: ", name, " is not yet supported");
}

struct DecodeCall {
  DecodeParams params;
  Tensor out;
  Tensor lse;
};

DecodeCall prepare_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                          const OptionalTensor& seq_lens, std::optional<double> scale, bool causal,
                          int64_t window_left, int64_t window_right, int64_t num_ctas) {
  const Argument q_arg{"decode", "q", q}, k_arg{"decode", "k_cache", k_cache},
      v_arg{"decode", "v_cache", v_cache};
  q_arg.has_shape("[batch, q_len, num_heads, head_dim]", 4);
  k_arg.has_shape("[batch, max_len, num_kv_heads, head_dim]", 4);
  v_arg.has_shape("[batch, max_len, num_kv_heads, head_dim_v]", 4);
  const DType dtype = dtype_of(q_arg);
  k_arg.has_dtype(q.scalar_type(), ", like q");
  v_arg.has_dtype(q.scalar_type(), ", like q");
  k_arg.is_on_device_of(q_arg);
  v_arg.is_on_device_of(q_arg);

  const int64_t batch = q.size(0), q_len = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  const int64_t max_len = k_cache.size(1), num_kv_heads = k_cache.size(2), head_dim_v = v_cache.size(3);
  check_head_dim("head_dim", head_dim);
  check_head_dim("head_dim_v", head_dim_v);
  if (k_cache.size(3) != head_dim) {
    fail("decode: k_cache has head_dim ", k_cache.size(3), ", q has ", head_dim, "; they must be equal");
  }
  k_arg.has_size(0, batch, "the batch size of q");
  v_arg.has_size(0, batch, "the batch size of q");
  v_arg.has_size(1, max_len, "the max_len of k_cache");
  v_arg.has_size(2, num_kv_heads, "the num_kv_heads of k_cache");
  if (num_heads == 0) fail("decode: q has no heads (shape ", shape_of(q), ")");
  if (num_kv_heads == 0) fail("decode: k_cache has no heads (shape ", shape_of(k_cache), ")");
  if (num_heads % num_kv_heads != 0) {
    fail("decode: q has ", num_heads, " heads, k_cache ", num_kv_heads,
         "; the first must be a multiple of the second");
  }
  q_arg.has_contiguous_rows();
  k_arg.has_contiguous_rows();
  v_arg.has_contiguous_rows();

  if (seq_lens) {
    const Argument arg{"decode", "seq_lens", *seq_lens};
    arg.has_shape("[batch]", 1);
    arg.has_dtype(ScalarType::Int, "");
    arg.has_size(0, batch, "the batch size of q");
    arg.is_on_device_of(q_arg);
  }
  if (scale && !std::isfinite(*scale)) fail("decode: scale is ", *scale, "; it must be finite");
  check_window("window_left", window_left);
  check_window("window_right", window_right);
  if (num_ctas < 0) fail("decode: num_ctas is ", num_ctas, "; it must be positive, or 0 to choose");

  DecodeCall call{
      .params = {},
      .out = torch::stable::new_empty(q, {batch, q_len, num_heads, head_dim_v}),
      .lse = torch::stable::new_empty(q, {batch, num_heads, q_len}, ScalarType::Float),
  };
  call.params = {
      .q = q.const_data_ptr(),
      .k_cache = k_cache.const_data_ptr(),
      .v_cache = v_cache.const_data_ptr(),
      .seq_lens = seq_lens ? static_cast<const int32_t*>(seq_lens->const_data_ptr()) : nullptr,
      .out = call.out.mutable_data_ptr(),
      .lse = static_cast<float*>(call.lse.mutable_data_ptr()),
      .dtype = dtype,
      .batch = batch,
      .num_heads = num_heads,
      .max_len = max_len,
      .head_dim = head_dim,
      .head_dim_v = head_dim_v,
      .q_batch_stride = q.stride(0),
      .q_token_stride = q.stride(1),
      .q_head_stride = q.stride(2),
      .k_batch_stride = k_cache.stride(0),
      .k_token_stride = k_cache.stride(1),
      .k_head_stride = k_cache.stride(2),
      .v_batch_stride = v_cache.stride(0),
      .v_token_stride = v_cache.stride(1),
      .v_head_stride = v_cache.stride(2),
      .seq_lens_stride = seq_lens ? seq_lens->stride(0) : 0,
      .scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head_dim))),
      .num_kv_heads = num_kv_heads,
      .visibility = {.q_len = q_len, .window_left = window_left, .window_right = causal ? 0 : window_right},
      .num_ctas = num_ctas,
  };
  return call;
}

#if defined(LEAN_WITH_CUDA) || defined(LEAN_EMULATED)
void decode_on_cuda(const Tensor& q, const DecodeParams& params) {
  if (params.dtype == DType::float32) fail("decode: q is Float; on cuda it must be Half or BFloat16");
  const int device = q.is_cpu() ? 0 : q.get_device_index();
  OptionalTensor workspace;  // until the launch is queued
  const auto allocate = [&](int64_t bytes) {
    workspace = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
    return workspace->mutable_data_ptr();
  };
#if defined(LEAN_EMULATED)
  cuda::decode(params, device, nullptr, allocate);
#else
  // Looked up in the library that has it: this one also loads beside a torch without CUDA.
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto current_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (current_stream == nullptr || current_stream(device, &stream) != 0) {
    throw std::runtime_error("decode: this torch gives no current CUDA stream");
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  cuda::decode(params, device, stream, allocate);
#endif
}
#else
void decode_on_cuda(const Tensor& q, const DecodeParams&) {
  fail("decode: q is on ", device_of(q),
       "; this build of lean_attention runs on cpu only (built "
       "without CUDA: no toolkit was found, or LEAN_ATTENTION_CUDA=0)");
}
#endif

void run_decode(const Tensor& q, const DecodeParams& params) {
#if defined(LEAN_EMULATED)
  decode_on_cuda(q, params);
#else
  if (q.is_cpu()) {
    cpu::decode(params);
  } else {
    decode_on_cuda(q, params);
  }
#endif
}

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const OptionalTensor& seq_lens, const OptionalTensor& block_table,
                                  const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                                  const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                  std::optional<double> scale, bool causal, int64_t window_left,
                                  int64_t window_right, double softcap, int64_t num_ctas) {
  reject("block_table", block_table.has_value());
  reject("cache_batch_idx", cache_batch_idx.has_value());
  reject("cache_leftpad", cache_leftpad.has_value());
  reject("alibi_slopes", alibi_slopes.has_value());
  reject("sinks", sinks.has_value());
  reject("softcap", softcap != 0.0);
  const DecodeCall call =
      prepare_decode(q, k_cache, v_cache, seq_lens, scale, causal, window_left, window_right, num_ctas);
  if (call.out.numel() > 0) run_decode(q, call.params);
  return {call.out, call.lse};
}

std::tuple<Tensor, Tensor> decode_fixed_split(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const OptionalTensor& seq_lens, int64_t splits) {
  if (splits < 1) fail("decode_fixed_split: splits is ", splits, "; it must be at least 1");
  const DecodeCall call = prepare_decode(q, k_cache, v_cache, seq_lens, std::nullopt, true, -1, -1, 0);
  if (call.out.numel() > 0) cpu::decode_fixed_split(call.params, splits);
  return {call.out, call.lse};
}

std::tuple<Tensor, Tensor> merge_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  if (outs.empty()) fail("merge_states: outs is empty; there must be at least one state");
  if (outs.size() != lses.size()) {
    fail("merge_states: outs has ", outs.size(), " tensors, lses ", lses.size(), "; there must be as many");
  }
  const Argument first{"merge_states", "outs[0]", outs[0]};
  first.has_shape("[batch, q_len, num_heads, head_dim_v]", 4);
  MergeParams params{
      .dtype = dtype_of(first),
      .num_states = static_cast<int64_t>(outs.size()),
      .batch = outs[0].size(0),
      .q_len = outs[0].size(1),
      .num_heads = outs[0].size(2),
      .head_dim_v = outs[0].size(3),
  };
  std::vector<Tensor> held;  // contiguous copies live until the end
  std::vector<const void*> out_pointers;
  std::vector<const float*> lse_pointers;
  for (size_t i = 0; i < outs.size(); ++i) {
    const std::string out_name = "outs[" + std::to_string(i) + "]",
                      lse_name = "lses[" + std::to_string(i) + "]";
    const Argument out{"merge_states", out_name.c_str(), outs[i]},
        lse{"merge_states", lse_name.c_str(), lses[i]};
    out.has_shape("[batch, q_len, num_heads, head_dim_v]", 4);
    lse.has_shape("[batch, num_heads, q_len]", 3);
    out.has_dtype(outs[0].scalar_type(), ", like outs[0]");
    lse.has_dtype(ScalarType::Float, "");
    out.is_on_device_of(first);
    lse.is_on_device_of(first);
    for (int64_t dim = 0; dim < 4; ++dim) out.has_size(dim, outs[0].size(dim), "like outs[0]");
    lse.has_size(0, params.batch, "the batch size of outs");
    lse.has_size(1, params.num_heads, "the num_heads of outs");
    lse.has_size(2, params.q_len, "the q_len of outs");
    held.push_back(torch::stable::contiguous(outs[i]));
    out_pointers.push_back(held.back().const_data_ptr());
    held.push_back(torch::stable::contiguous(lses[i]));
    lse_pointers.push_back(static_cast<const float*>(held.back().const_data_ptr()));
  }
  Tensor out = torch::stable::new_empty(outs[0], outs[0].sizes());
  Tensor lse = torch::stable::new_empty(lses[0], lses[0].sizes());
  params.outs = out_pointers.data();
  params.lses = lse_pointers.data();
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (!out.is_cpu()) {
    fail("merge_states: outs[0] is on ", device_of(out), "; it runs on cpu only, not yet on cuda");
  }
  cpu::merge_states(params);
  return {out, lse};
}

}  // namespace
}  // namespace lean

STABLE_TORCH_LIBRARY(LEAN_LIBRARY, m) {
  m.def(
      "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? seq_lens=None, Tensor? "
      "block_table=None, "
      "Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, *, float? scale=None, bool causal=True, int window_left=-1, int "
      "window_right=-1, "
      "float softcap=0.0, int num_ctas=0) -> (Tensor out, Tensor lse)");
  m.def(
      "decode_fixed_split(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? seq_lens=None, *, int splits=1) "
      "-> (Tensor out, Tensor lse)");
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_LIBRARY, CPU, m) {
  m.impl("decode", TORCH_BOX(&lean::decode));
  m.impl("decode_fixed_split", TORCH_BOX(&lean::decode_fixed_split));
  m.impl("merge_states", TORCH_BOX(&lean::merge_states));
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_LIBRARY, CUDA, m) {
  m.impl("decode", TORCH_BOX(&lean::decode));
  m.impl("merge_states", TORCH_BOX(&lean::merge_states));
}
