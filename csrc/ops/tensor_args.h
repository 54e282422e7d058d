// Checks of tensor arguments, and their errors: the argument's name, what it is, what it must be.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "fail.h"
#include "params.h"

namespace lean {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const OptionalTensor kNoTensor;

template <class Numbers>
std::string list_of(const Numbers& numbers) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t number : numbers) {
    text << separator << number;
    separator = ", ";
  }
  if (numbers.size() == 0) text << separator;
  text << "]";
  return text.str();
}

inline std::string shape_of(const Tensor& t) {
  return list_of(t.sizes());
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

// The name that a user writes.
inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// A tensor argument with the names that its errors use.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  void has_shape(const char* layout, int64_t rank) const {
    if (tensor.dim() != rank) {
      fail(op, ": ", name, " has shape ", shape_of(tensor), "; it must have ", rank,
           rank == 1 ? " dimension, " : " dimensions, ", layout);
    }
  }
  void has_size(int64_t dim, int64_t want, const char* what) const {
    if (tensor.size(dim) != want) {
      fail(op, ": ", name, " has shape ", shape_of(tensor), "; its dimension ", dim, " must be ", want, ", ",
           what);
    }
  }
  // The tensor has one dimension, of size `want`.
  void is_list_of(const char* layout, int64_t want, const char* what) const {
    has_shape(layout, 1);
    has_size(0, want, what);
  }
  void has_dtype(ScalarType want, const char* why) const {
    if (tensor.scalar_type() != want) {
      fail(op, ": ", name, " is ", name_of(tensor.scalar_type()), "; it must be ", name_of(want), why);
    }
  }
  // Backends read either as it is.
  void has_dtype_of_indices() const {
    if (tensor.scalar_type() != ScalarType::Long) has_dtype(ScalarType::Int, " or torch.int64");
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
  // The tensor, of at most four dimensions, is written: no two elements may be one in memory. Each dimension
  // has to step over all that the denser ones span, as it does in every view of a tensor but expanded ones
  // and windows.
  void has_memory_of_its_own() const {
    if (tensor.numel() == 0) return;
    std::array<std::pair<int64_t, int64_t>, 4> steps;  // stride and size
    int count = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      if (tensor.size(dim) > 1) steps[count++] = {tensor.stride(dim), tensor.size(dim)};
    }
    std::sort(steps.begin(), steps.begin() + count);
    int64_t last = 0;  // element, counted from the first
    for (int i = 0; i < count; ++i) {
      const auto [stride, size] = steps[i];
      if (stride <= last) {
        fail(op, ": ", name, " has shape ", shape_of(tensor), " and strides ", list_of(tensor.strides()),
             ", by which elements share memory; it is written, so each must have its own");
      }
      last += (size - 1) * stride;
    }
  }
};

// The dtype of a quantised tensor; nothing where it is not one of those.
inline std::optional<DType> quantised_dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float8_e4m3fn:
      return DType::float8_e4m3;
    case ScalarType::Float8_e5m2:
      return DType::float8_e5m2;
    case ScalarType::Char:
      return DType::int8;
    default:
      return std::nullopt;
  }
}

// The tensors of a call that had to be copied, until its end.
class Copies {
 public:
  // The tensor's data if it is contiguous, else a contiguous copy's.
  const void* contiguous(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    copies_.push_back(torch::stable::contiguous(tensor));
    return copies_.back().const_data_ptr();
  }

 private:
  std::vector<Tensor> copies_;
};

// The numbers of a tensor of indices, of which `data` is the first one.
inline Indices indices(const Tensor& tensor, const void* data) {
  return {data, tensor.scalar_type() == ScalarType::Long};
}

// Device memory for a call, until its work is queued: torch gives it to later work of the same stream only.
class DeviceMemory {
 public:
  explicit DeviceMemory(const Tensor& like) : like_(like) {}
  void* allocate(int64_t bytes) {
    memory_ = torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
    return memory_->mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  OptionalTensor memory_;
};

template <class View, class Data>
View cache_view(const Tensor& cache, DType dtype, Data* data) {
  return {.data = data,
          .dtype = dtype,
          .dims = cache.size(3),
          .block_stride = cache.stride(0),
          .token_stride = cache.stride(1),
          .head_stride = cache.stride(2),
          .scale = {}};
}

// What says where a call's sequences lie, of the op's arguments.
struct PageArgs {
  const Argument& k_cache;
  const OptionalTensor& block_table;
  const OptionalTensor& cache_batch_idx;
  bool takes_tables_per_head;
  const Argument& tokens;  // q or k: the table is on its device
  int64_t batch;
  const char* batch_is;  // what errors call it
};

// The pages but for cache_batch_idx, which the caller checks and sets.
inline PageTable page_table(const PageArgs& args) {
  const char* op = args.k_cache.op;
  if (args.cache_batch_idx && args.block_table) {
    fail(op,
         ": cache_batch_idx cannot be combined with block_table, which already says where a sequence lies");
  }
  PageTable pages{};
  pages.num_blocks = args.k_cache.tensor.size(0);
  pages.block_size = args.k_cache.tensor.size(1);
  pages.max_blocks = 1;
  if (!args.block_table) return pages;
  const Argument arg{op, "block_table", *args.block_table};
  const Tensor& table = arg.tensor;
  const bool per_head = args.takes_tables_per_head && table.dim() == 3;
  if (!per_head) {
    arg.has_shape(args.takes_tables_per_head ? "[batch, max_blocks] or [batch, num_kv_heads, max_blocks]"
                                             : "[batch, max_blocks]",
                  2);
  }
  arg.has_dtype_of_indices();
  arg.has_size(0, args.batch, args.batch_is);
  if (per_head) arg.has_size(1, args.k_cache.tensor.size(2), "the num_kv_heads of k_cache");
  arg.has_contiguous_rows();
  arg.is_on_device_of(args.tokens);
  pages.block_table = indices(table, table.const_data_ptr());
  pages.max_blocks = table.size(table.dim() - 1);
  pages.batch_stride = table.stride(0);
  pages.head_stride = per_head ? table.stride(1) : 0;
  return pages;
}

inline DType dtype_of(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      fail(op, ": ", name, " is ", name_of(dtype),
           "; it must be torch.float32, torch.float16 or torch.bfloat16");
  }
}
inline DType dtype_of(const Argument& argument) {
  return dtype_of(argument.op, argument.name, argument.tensor.scalar_type());
}

}  // namespace lean
