// Checks of tensor arguments, and their errors: the argument's name, what it is, what it must be.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace lean {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline std::string device_of(const Tensor& t) {
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
  // Of one dimension, as many as `want`.
  void is_list_of(const char* layout, int64_t want, const char* what) const {
    has_shape(layout, 1);
    has_size(0, want, what);
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

// Where a sequence lies is said once.
inline void refuse_slots_beside_pages(const char* op, bool slots, bool pages) {
  if (slots && pages) {
    fail(op,
         ": cache_batch_idx cannot be combined with block_table, which already says where a sequence lies");
  }
}

inline DType dtype_of(const Argument& argument) {
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

}  // namespace lean
