#include "ops/decode_call.h"

#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cmath>

namespace lean {
namespace {

void check_head_dim(const char* name, int64_t head_dim) {
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    fail("decode: ", name, " is ", head_dim, "; it must be a multiple of 8 from 8 to ", kMaxHeadDim);
  }
}

void check_window(const char* name, int64_t window) {
  if (window < -1) fail("decode: ", name, " is ", window, "; it must be -1 (unbounded) or at least 0");
}

}  // namespace

DecodeCall::DecodeCall(const DecodeArgs& args)
    : q_{"decode", "q", args.q},
      k_{"decode", "k_cache", args.k_cache},
      v_{"decode", "v_cache", args.v_cache},
      a_(args) {
  take_queries();
  take_caches();
  take_lengths();
  take_pages();
  take_scores();
  take_visibility();
  take_shared();
  p_.k.scale = scales("k_scale", a_.k_scale);
  p_.v.scale = scales("v_scale", a_.v_scale);
  if (a_.num_ctas < 0) fail("decode: num_ctas is ", a_.num_ctas, "; it must be positive, or 0 to choose");
  p_.num_ctas = a_.num_ctas;
}

// Contiguous, on q's device. Not by an op of torch's: a call that reads a cache finds their dispatch, which
// is much code, in no cache of the processor, and waits for it.
template <int rank>
Tensor DecodeCall::fresh_tensor(const std::array<int64_t, rank>& sizes, int32_t dtype) const {
  std::array<int64_t, rank> strides;
  int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(q_.tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(q_.tensor.get(), &device_index));
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes.data(), strides.data(), dtype, device_type,
                                                  device_index, &tensor));
  return Tensor(tensor);
}

// Float32 is for outputs that are merged with others before they are rounded.
void DecodeCall::check_out_dtype(const char* name, ScalarType dtype) const {
  const ScalarType like_q = q_.tensor.scalar_type();
  if (dtype == like_q || dtype == ScalarType::Float) return;
  fail("decode: ", name, " is ", name_of(dtype), "; it must be ", name_of(like_q), ", like q",
       like_q == ScalarType::Float ? "" : ", or torch.float32");
}

const DecodeParams& DecodeCall::with_outputs(const Tensor& given_out, const Tensor& given_lse) {
  const bool packed = bool{p_.cu_seqlens_q};
  const Argument out_arg{"decode", "out", given_out}, lse_arg{"decode", "lse", given_lse};
  const int64_t first = packed ? 0 : 1;
  out_arg.has_shape(packed ? "[total_q, num_heads, head_dim_v]" : "[batch, q_len, num_heads, head_dim_v]",
                    first + 3);
  lse_arg.has_shape(packed ? "[num_heads, total_q]" : "[batch, num_heads, q_len]", first + 2);
  check_out_dtype("out", given_out.scalar_type());
  lse_arg.has_dtype(ScalarType::Float, "");
  if (!packed) out_arg.has_size(0, p_.batch, "the batch size of q");
  if (!packed) lse_arg.has_size(0, p_.batch, "the batch size of q");
  out_arg.has_size(first, p_.query_tokens, "the query tokens of q");
  out_arg.has_size(first + 1, p_.num_heads, "the num_heads of q");
  out_arg.has_size(first + 2, p_.v.dims, "the head_dim_v of v_cache");
  lse_arg.has_size(first, p_.num_heads, "the num_heads of q");
  lse_arg.has_size(first + 1, p_.query_tokens, "the query tokens of q");
  out_arg.is_on_device_of(q_);
  lse_arg.is_on_device_of(q_);
  out_arg.has_contiguous_rows();
  lse_arg.has_contiguous_rows();
  out = given_out;
  lse = given_lse;
  p_.out = out->mutable_data_ptr();
  p_.out_dtype = dtype_of(out_arg);
  p_.lse = static_cast<float*>(lse->mutable_data_ptr());
  p_.out_batch_stride = packed ? 0 : out->stride(0);
  p_.out_token_stride = out->stride(first);
  p_.out_head_stride = out->stride(first + 1);
  p_.lse_batch_stride = packed ? 0 : lse->stride(0);
  p_.lse_head_stride = lse->stride(first);
  return p_;
}

const DecodeParams& DecodeCall::with_outputs(std::optional<ScalarType> out_dtype) {
  if (out_dtype) check_out_dtype("out_dtype", *out_dtype);
  const bool packed = bool{p_.cu_seqlens_q};
  const int64_t tokens = p_.query_tokens, heads = p_.num_heads, dim = p_.v.dims;
  const int32_t lse_dtype = aoti_torch_dtype_float32();
  int32_t dtype = lse_dtype;
  if (out_dtype != ScalarType::Float) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q_.tensor.get(), &dtype));
  }
  if (packed) {
    return with_outputs(fresh_tensor<3>({tokens, heads, dim}, dtype),
                        fresh_tensor<2>({heads, tokens}, lse_dtype));
  }
  return with_outputs(fresh_tensor<4>({p_.batch, tokens, heads, dim}, dtype),
                      fresh_tensor<3>({p_.batch, heads, tokens}, lse_dtype));
}

void DecodeCall::take_queries() {
  const Tensor& q = q_.tensor;
  const bool packed = a_.cu_seqlens_q.has_value();
  if (packed) {
    q_.has_shape("[total_q, num_heads, head_dim] with cu_seqlens_q", 3);
  } else {
    q_.has_shape("[batch, q_len, num_heads, head_dim]", 4);
  }
  p_.dtype = dtype_of(q_);
  q_.has_contiguous_rows();
  const int64_t first = packed ? 0 : 1;
  p_.query_tokens = q.size(first);
  p_.num_heads = q.size(first + 1);
  p_.q = q.const_data_ptr();
  p_.q_batch_stride = packed ? 0 : q.stride(0);
  p_.q_token_stride = q.stride(first);
  p_.q_head_stride = q.stride(first + 1);
  check_head_dim("head_dim", q.size(first + 2));
  if (p_.num_heads == 0) fail("decode: q has no heads (shape ", shape_of(q), ")");
  if (packed) {
    const Argument arg{"decode", "cu_seqlens_q", *a_.cu_seqlens_q};
    arg.has_shape("[batch + 1]", 1);
    if (arg.tensor.size(0) == 0) fail("decode: cu_seqlens_q is empty; it must have batch + 1 entries");
    p_.cu_seqlens_q = integers(arg);
    p_.batch = arg.tensor.size(0) - 1;
  } else {
    p_.batch = q.size(0);
  }
}

void DecodeCall::take_caches() {
  const bool paged = a_.block_table.has_value();
  const Tensor &k = k_.tensor, &v = v_.tensor;
  k_.has_shape(
      paged ? "[num_blocks, block_size, num_kv_heads, head_dim]" : "[batch, max_len, num_kv_heads, head_dim]",
      4);
  v_.has_shape(paged ? "[num_blocks, block_size, num_kv_heads, head_dim_v]"
                     : "[batch, max_len, num_kv_heads, head_dim_v]",
               4);
  const DType dtype = cache_dtype();
  v_.has_dtype(k.scalar_type(), ", like k_cache");
  k_.is_on_device_of(q_);
  v_.is_on_device_of(q_);
  p_.num_kv_heads = k.size(2);
  check_head_dim("head_dim_v", v.size(3));
  if (const int64_t head_dim = q_.tensor.size(q_.tensor.dim() - 1); k.size(3) != head_dim) {
    fail("decode: k_cache has head_dim ", k.size(3), ", q has ", head_dim, "; they must be equal");
  }
  if (!paged && !a_.cache_batch_idx) k_.has_size(0, p_.batch, "the batch size of q");
  v_.has_size(0, k.size(0), paged ? "the num_blocks of k_cache" : "the batch size of k_cache");
  v_.has_size(1, k.size(1), paged ? "the block_size of k_cache" : "the max_len of k_cache");
  v_.has_size(2, p_.num_kv_heads, "the num_kv_heads of k_cache");
  if (p_.num_kv_heads == 0) fail("decode: k_cache has no heads (shape ", shape_of(k), ")");
  if (p_.num_heads % p_.num_kv_heads != 0) {
    fail("decode: q has ", p_.num_heads, " heads, k_cache ", p_.num_kv_heads,
         "; the first must be a multiple of the second");
  }
  if (paged && k.size(1) == 0) fail("decode: k_cache has a block_size of 0; it must be at least 1");
  k_.has_contiguous_rows();
  v_.has_contiguous_rows();
  p_.k = cache_view<CacheView>(k, dtype, k.const_data_ptr());
  p_.v = cache_view<CacheView>(v, dtype, v.const_data_ptr());
}

DType DecodeCall::cache_dtype() const {
  if (const auto quantised = quantised_dtype_of(k_.tensor)) return *quantised;
  k_.has_dtype(q_.tensor.scalar_type(), ", like q, or torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8");
  return p_.dtype;
}

void DecodeCall::take_lengths() {
  if (a_.seq_lens) {
    const Argument arg{"decode", "seq_lens", *a_.seq_lens};
    p_.lengths_per_head = a_.block_table && arg.tensor.dim() == 2;
    if (p_.lengths_per_head) {
      arg.has_size(1, p_.num_kv_heads, "the num_kv_heads of k_cache");
      p_.seq_lens_head_stride = arg.tensor.stride(1);
    } else {
      arg.has_shape(a_.block_table ? "[batch] or [batch, num_kv_heads]" : "[batch]", 1);
    }
    arg.has_dtype_of_indices();
    arg.has_size(0, p_.batch, "the batch size of q");
    arg.is_on_device_of(q_);
    p_.seq_lens = indices(arg.tensor, arg.tensor.const_data_ptr());
    p_.seq_lens_batch_stride = arg.tensor.stride(0);
  }
  if (a_.cache_leftpad) {
    const Argument arg{"decode", "cache_leftpad", *a_.cache_leftpad};
    arg.is_list_of("[batch]", p_.batch, "the batch size of q");
    p_.cache_leftpad = integers(arg);
  }
}

void DecodeCall::take_pages() {
  p_.pages = page_table({.k_cache = k_,
                         .block_table = a_.block_table,
                         .cache_batch_idx = a_.cache_batch_idx,
                         .takes_tables_per_head = true,
                         .tokens = q_,
                         .batch = p_.batch,
                         .batch_is = "the batch size of q"});
  if (!a_.cache_batch_idx) return;
  const Argument arg{"decode", "cache_batch_idx", *a_.cache_batch_idx};
  arg.is_list_of("[batch]", p_.batch, "the batch size of q");
  p_.pages.cache_batch_idx = integers(arg);
}

void DecodeCall::take_scores() {
  if (a_.scores.scale && !std::isfinite(*a_.scores.scale))
    fail("decode: scale is ", *a_.scores.scale, "; it must be finite");
  p_.scale = static_cast<float>(a_.scores.scale ? *a_.scores.scale
                                                : 1.0 / std::sqrt(static_cast<double>(p_.k.dims)));
  if (!std::isfinite(a_.scores.softcap) || a_.scores.softcap < 0.0) {
    fail("decode: softcap is ", a_.scores.softcap, "; it must be positive and finite, or 0 for none");
  }
  p_.softcap = static_cast<float>(a_.scores.softcap);
  if (a_.alibi_slopes) {
    const Argument arg{"decode", "alibi_slopes", *a_.alibi_slopes};
    const bool per_sequence = arg.tensor.dim() == 2;
    if (!per_sequence) arg.has_shape("[num_heads] or [batch, num_heads]", 1);
    if (per_sequence) arg.has_size(0, p_.batch, "the batch size of q");
    arg.has_size(per_sequence ? 1 : 0, p_.num_heads, "the num_heads of q");
    p_.alibi_slopes = floats(arg);
    p_.alibi_batch_stride = per_sequence ? p_.num_heads : 0;
  }
  if (a_.sinks) {
    const Argument arg{"decode", "sinks", *a_.sinks};
    arg.is_list_of("[num_heads]", p_.num_heads, "the num_heads of q");
    p_.sinks = floats(arg);
  }
}

void DecodeCall::take_visibility() {
  check_window("window_left", a_.window_left);
  check_window("window_right", a_.window_right);
  p_.visibility = {a_.window_left, a_.causal ? 0 : a_.window_right};
  if (!a_.tree_mask) return;
  const Argument arg{"decode", "tree_mask", *a_.tree_mask};
  const char* why = nullptr;
  if (!a_.causal) why = "causal=False";
  if (a_.window_left >= 0) why = "window_left";
  if (a_.alibi_slopes) why = "alibi_slopes";
  if (why != nullptr) {
    fail("decode: tree_mask cannot be combined with ", why,
         ": the position of a new token in a tree is not its index");
  }
  const Tensor& mask = arg.tensor;
  const bool packed = bool{p_.cu_seqlens_q};
  if (packed) {
    arg.has_shape("[total_q, max_q_len] with cu_seqlens_q", 2);
    arg.has_size(0, p_.query_tokens, "the total_q of q");
  } else {
    const bool shared = mask.dim() == 2;
    if (!shared) arg.has_shape("[q_len, q_len] or [batch, q_len, q_len]", 3);
    if (!shared) arg.has_size(0, p_.batch, "the batch size of q");
    arg.has_size(shared ? 0 : 1, p_.query_tokens, "the q_len of q");
    arg.has_size(shared ? 1 : 2, p_.query_tokens, "the q_len of q");
  }
  arg.has_dtype(ScalarType::Bool, "");
  arg.is_on_device_of(q_);
  p_.tree_mask = static_cast<const bool*>(copies_.contiguous(mask));
  p_.tree_columns = mask.size(mask.dim() - 1);
  p_.tree_row_stride = p_.tree_columns;
  p_.tree_batch_stride = mask.dim() == 3 ? p_.query_tokens * p_.tree_columns : 0;
  p_.visibility.window_right = -1;  // the mask decides
}

void DecodeCall::take_shared() {
  if (!a_.shared) return;
  const Argument arg{"decode", "shared", *a_.shared};
  arg.has_shape("[count, 4]", 2);
  arg.has_size(1, 4, "first sequence, end sequence, first token, end token");
  arg.has_dtype(ScalarType::Int, "");
  arg.is_on_device_of(q_);
  // Rows of shared tokens see all of them, at any distance, with the scales of their first sequence.
  const auto per_sequence = [](const OptionalTensor& scale) {
    return scale && scale->dim() == 2 && scale->size(0) > 1;
  };
  const char* why = nullptr;
  if (a_.cache_leftpad) why = "cache_leftpad";
  if (a_.window_left >= 0) why = "window_left";
  if (a_.alibi_slopes) why = "alibi_slopes";
  if (p_.lengths_per_head) why = "seq_lens of each KV head";
  if (p_.pages.head_stride != 0) why = "a block_table of each KV head";
  if (per_sequence(a_.k_scale)) why = "a k_scale of each sequence";
  if (per_sequence(a_.v_scale)) why = "a v_scale of each sequence";
  if (why != nullptr) fail("decode: shared cannot be combined with ", why);
  p_.shared = {static_cast<const int32_t*>(copies_.contiguous(arg.tensor)), arg.tensor.size(0)};
}

Scales DecodeCall::scales(const char* name, const OptionalTensor& tensor) const {
  if (!tensor) {
    if (p_.k.dtype == DType::int8) fail("decode: ", name, " is missing; int8 caches need it");
    return {};
  }
  const Argument arg{"decode", name, *tensor};
  const Tensor& t = *tensor;
  if (!p_.quantised()) {
    fail("decode: ", name, " is given, but the caches are ", name_of(k_.tensor.scalar_type()),
         "; scales are for quantised caches");
  }
  arg.has_dtype(ScalarType::Float, "");
  arg.is_on_device_of(q_);
  Scales scales;
  scales.data = static_cast<const float*>(t.const_data_ptr());
  if (t.numel() == 1 && t.dim() <= 1) return scales;
  if (t.dim() < 1 || t.dim() > 3) {
    fail("decode: ", name, " has shape ", shape_of(t),
         "; it must be a scalar, [num_kv_heads], [batch, num_kv_heads] or one per row of the cache, [",
         p_.pages.num_blocks, ", ", p_.pages.block_size, ", ", p_.num_kv_heads, "]");
  }
  const auto stride = [&](int64_t dim, int64_t size, const char* what) {
    if (t.size(dim) != 1) arg.has_size(dim, size, what);
    return t.size(dim) == 1 ? 0 : t.stride(dim);
  };
  const int64_t last = t.dim() - 1;
  scales.head_stride = stride(last, p_.num_kv_heads, "1 or the num_kv_heads of k_cache");
  if (t.dim() == 2) scales.sequence_stride = stride(0, p_.batch, "1 or the batch size of q");
  if (t.dim() == 3) {
    scales.block_stride = stride(0, p_.pages.num_blocks, "1 or the first dimension of k_cache");
    scales.token_stride = stride(1, p_.pages.block_size, "1 or the second dimension of k_cache");
  }
  return scales;
}

Indices DecodeCall::integers(const Argument& arg) {
  arg.has_dtype_of_indices();
  arg.is_on_device_of(q_);
  return indices(arg.tensor, copies_.contiguous(arg.tensor));
}
const float* DecodeCall::floats(const Argument& arg) {
  arg.has_dtype(ScalarType::Float, "");
  arg.is_on_device_of(q_);
  return static_cast<const float*>(copies_.contiguous(arg.tensor));
}

}  // namespace lean
