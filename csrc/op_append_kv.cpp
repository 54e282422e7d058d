// append_kv: checks, parameters, dispatch.
#include <torch/csrc/stable/ops.h>

#include "append.h"
#include "arguments.h"
#include "cpu/backend.h"
#include "cuda/backend.h"
#include "dispatch.h"
#include "ops.h"

namespace lean {
namespace {

class AppendCall {
 public:
  AppendCall(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
             const Tensor& seq_lens, const OptionalTensor& block_table, const OptionalTensor& cache_batch_idx,
             const OptionalTensor& cu_seqlens, const OptionalTensor& q, const OptionalTensor& rotary_cos,
             const OptionalTensor& rotary_sin, bool interleaved, const OptionalTensor& k_scale,
             const OptionalTensor& v_scale)
      : k_{"append_kv", "k", k}, packed_(cu_seqlens.has_value()) {
    const bool paged = block_table.has_value();
    const char* cache_layout = paged ? "[num_blocks, block_size, num_kv_heads, head_dim]"
                                     : "[batch, max_len, num_kv_heads, head_dim]";
    const Argument k_cache_arg{"append_kv", "k_cache", k_cache}, v_cache_arg{"append_kv", "v_cache", v_cache},
        v_arg{"append_kv", "v", v};
    k_cache_arg.has_shape(cache_layout, 4);
    v_cache_arg.has_shape(cache_layout, 4);
    take_new("[batch, tokens, num_kv_heads, head_dim]", k_);
    take_new("[batch, tokens, num_kv_heads, head_dim_v]", v_arg);
    const int64_t last = packed_ ? 2 : 3;
    p.num_kv_heads = k.size(last - 1);
    p.tokens = k.size(last - 2);
    for (int64_t dim = 0; dim < last; ++dim) v_arg.has_size(dim, k.size(dim), "like k");
    const auto quantised = quantised_dtype_of(k);
    p.dtype = quantised ? *quantised : dtype_of(k_);
    const DType cache_dtype = quantised ? p.dtype : quantised_dtype_of(k_cache).value_or(p.dtype);
    p.k_cache = cache_view<WritableCacheView>(k_cache, cache_dtype, k_cache.mutable_data_ptr());
    p.v_cache = cache_view<WritableCacheView>(v_cache, cache_dtype, v_cache.mutable_data_ptr());
    v_arg.has_dtype(k.scalar_type(), ", like k");
    p.pages.num_blocks = k_cache.size(0);
    p.pages.block_size = k_cache.size(1);
    if (paged && p.pages.block_size == 0)
      fail("append_kv: k_cache has a block_size of 0; it must be at least 1");
    for (const Argument& cache : {k_cache_arg, v_cache_arg}) {
      if (p.quantises()) {
        cache.has_dtype(k_cache.scalar_type(), ", like k_cache");
      } else {
        cache.has_dtype(k.scalar_type(), ", like k");
      }
      cache.has_size(0, p.pages.num_blocks, "like k_cache");
      cache.has_size(1, p.pages.block_size, "like k_cache");
      cache.has_size(2, p.num_kv_heads, "the num_kv_heads of k");
      cache.has_contiguous_rows();
      cache.has_memory_of_its_own();
      cache.is_on_device_of(k_);
    }
    k_cache_arg.has_size(3, k.size(last), "the head_dim of k");
    v_cache_arg.has_size(3, v.size(last), "the head_dim of v");
    p.batch = packed_ ? cu_seqlens->numel() - 1 : k.size(0);
    if (p.batch < 0) fail("append_kv: cu_seqlens is empty; it must have batch + 1 entries");

    p.seq_lens = list("seq_lens", "[batch]", seq_lens, p.batch);
    if (packed_) p.cu_seqlens = list("cu_seqlens", "[batch + 1]", *cu_seqlens, p.batch + 1);
    refuse_slots_beside_pages("append_kv", cache_batch_idx.has_value(), paged);
    p.pages.max_blocks = 1;
    if (paged) {
      const Argument table{"append_kv", "block_table", *block_table};
      table.has_shape("[batch, max_blocks]", 2);
      table.has_dtype(ScalarType::Int, "");
      table.has_size(0, p.batch, "the batch size of k");
      table.has_contiguous_rows();
      table.is_on_device_of(k_);
      p.pages.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
      p.pages.max_blocks = block_table->size(1);
      p.pages.batch_stride = block_table->stride(0);
    } else if (cache_batch_idx) {
      p.pages.cache_batch_idx = list("cache_batch_idx", "[batch]", *cache_batch_idx, p.batch);
    } else {
      k_cache_arg.has_size(0, p.batch, "the batch size of k");
    }
    take_rotary(q, rotary_cos, rotary_sin, interleaved);
    p.k_cache.scale = row_scales("k_scale", k_scale, k_cache_arg);
    p.v_cache.scale = row_scales("v_scale", v_scale, v_cache_arg);
    p.k = new_rows(k, k.const_data_ptr());
    p.v = new_rows(v, v.const_data_ptr());
    check_shared_memory();
  }

  AppendParams p{};

 private:
  // One memory for K and V, as latent attention has it, takes tokens that are one too. Their scales then may
  // be one as well.
  void check_shared_memory() const {
    if (p.all_tokens() * p.rows_per_token() == 0) return;
    if (p.k_cache.data != p.v_cache.data) {
      if (p.quantises() && p.k_cache.scale.data == p.v_cache.scale.data) {
        fail("append_kv: v_scale is k_scale's memory, and v_cache is not k_cache's; each needs its own");
      }
      return;
    }
    if (p.k.data != p.v.data) {
      fail("append_kv: v_cache is k_cache's memory, and v is not k's; keys would be overwritten by values");
    }
    if (p.cos) fail("append_kv: v_cache is k_cache's memory; rotary_cos would rotate k, but not v");
    if (p.quantises() && p.v_cache.dims != p.k_cache.dims) {
      fail("append_kv: v_cache is k_cache's memory, and v has head_dim ", p.v_cache.dims, ", k ",
           p.k_cache.dims, "; rows that are quantised together must be as long");
    }
  }

  void take_new(const char* layout, const Argument& arg) const {
    if (packed_) {
      arg.has_shape("[total, heads, dim] with cu_seqlens", 3);
    } else {
      arg.has_shape(layout, 4);
    }
    arg.has_contiguous_rows();
    arg.is_on_device_of(k_);
  }

  void take_rotary(const OptionalTensor& q, const OptionalTensor& cos, const OptionalTensor& sin,
                   bool interleaved) {
    if (cos.has_value() != sin.has_value()) {
      fail("append_kv: rotary_", cos ? "sin" : "cos", " is missing; rotary_cos and rotary_sin come together");
    }
    if (q && !cos)
      fail("append_kv: q is given without rotary_cos and rotary_sin; there is nothing to do to it");
    if (!cos) return;
    if (quantised_dtype_of(k_.tensor)) {
      fail("append_kv: k is ", k_.tensor.scalar_type(), "; rotary embedding needs Float, Half or BFloat16");
    }
    const Argument cos_arg{"append_kv", "rotary_cos", *cos}, sin_arg{"append_kv", "rotary_sin", *sin};
    for (const Argument& table : {cos_arg, sin_arg}) {
      table.has_shape("[max_position, rotary_dim / 2]", 2);
      table.has_size(0, cos->size(0), "like rotary_cos");
      table.has_size(1, cos->size(1), "like rotary_cos");
      if (table.tensor.scalar_type() != ScalarType::Float)
        table.has_dtype(k_.tensor.scalar_type(), ", like k, or Float");
      table.has_dtype(cos->scalar_type(), ", like rotary_cos");
      table.has_contiguous_rows();
      table.is_on_device_of(k_);
    }
    p.cos = cos->const_data_ptr();
    p.sin = sin->const_data_ptr();
    p.cos_stride = cos->stride(0);
    p.sin_stride = sin->stride(0);
    p.rotary_dtype = dtype_of(cos_arg);
    p.interleaved = interleaved;
    p.max_position = cos->size(0);
    p.rotary_dim = 2 * cos->size(1);
    if (p.rotary_dim > p.k_cache.dims) {
      fail("append_kv: rotary_cos has shape ", shape_of(*cos), ", which rotates ", p.rotary_dim,
           " dims; k has ", p.k_cache.dims);
    }
    if (!q) return;
    const Argument q_arg{"append_kv", "q", *q};
    take_new("[batch, tokens, num_heads, head_dim]", q_arg);
    q_arg.has_memory_of_its_own();
    q_arg.has_dtype(k_.tensor.scalar_type(), ", like k");
    const int64_t last = packed_ ? 2 : 3;
    for (int64_t dim = 0; dim <= last; ++dim) {
      if (dim != last - 1) q_arg.has_size(dim, k_.tensor.size(dim), "like k");
    }
    p.num_heads = q->size(last - 1);
    p.q = new_rows(*q, q->mutable_data_ptr());
  }

  ScalesOf<float> row_scales(const char* name, const OptionalTensor& scales, const Argument& cache) const {
    const ScalarType new_dtype = k_.tensor.scalar_type(), dtype = cache.tensor.scalar_type();
    if (!scales) {
      if (!p.quantises()) return {};
      fail("append_kv: ", name, " is missing; ", cache.name, " is ", dtype, " and k is ", new_dtype,
           ", so rows are quantised and it takes their scales");
    }
    const Argument arg{"append_kv", name, *scales};
    if (!p.quantises()) {
      fail("append_kv: ", name, " is given, and k is ", new_dtype, ", as is ", cache.name,
           "; scales are written where a quantised cache takes tokens that are Float, Half or BFloat16");
    }
    arg.has_shape("those of the cache without its last one", 3);
    for (int64_t dim = 0; dim < 3; ++dim) arg.has_size(dim, cache.tensor.size(dim), "as in the cache");
    arg.has_dtype(ScalarType::Float, "");
    arg.is_on_device_of(k_);
    arg.has_memory_of_its_own();
    return {.data = static_cast<float*>(scales->mutable_data_ptr()),
            .block_stride = scales->stride(0),
            .token_stride = scales->stride(1),
            .head_stride = scales->stride(2)};
  }

  const int32_t* list(const char* name, const char* layout, const Tensor& tensor, int64_t size) {
    const Argument arg{"append_kv", name, tensor};
    arg.is_list_of(layout, size, "the batch size of k (cu_seqlens: and one more)");
    arg.has_dtype(ScalarType::Int, "");
    arg.is_on_device_of(k_);
    held_[num_held_] = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    return static_cast<const int32_t*>(held_[num_held_++]->const_data_ptr());
  }

  template <class Data>
  NewRowsOf<Data> new_rows(const Tensor& t, Data* data) const {
    const int64_t first = packed_ ? 0 : 1;
    return {.data = data,
            .batch_stride = packed_ ? 0 : t.stride(0),
            .token_stride = t.stride(first),
            .head_stride = t.stride(first + 1)};
  }

  const Argument k_;
  const bool packed_;
  OptionalTensor held_[3];
  int num_held_ = 0;
};

}  // namespace

void append_kv(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& seq_lens,
               const OptionalTensor& block_table, const OptionalTensor& cache_batch_idx,
               const OptionalTensor& cu_seqlens, OptionalTensor q, const OptionalTensor& rotary_cos,
               const OptionalTensor& rotary_sin, bool rotary_interleaved, OptionalTensor k_scale,
               OptionalTensor v_scale) {
  const AppendCall call(k_cache, v_cache, k, v, seq_lens, block_table, cache_batch_idx, cu_seqlens, q,
                        rotary_cos, rotary_sin, rotary_interleaved, k_scale, v_scale);
  if (call.p.all_tokens() * call.p.rows_per_token() == 0) return;
  dispatch(
      {"append_kv", "k", k}, [&] { cpu::append_kv(call.p); },
      [&](int device, void* stream) { cuda::append_kv(call.p, device, stream); });
}

}  // namespace lean
