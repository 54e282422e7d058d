// append_kv: new tokens into the caches.
#include <torch/csrc/stable/library.h>

#include "ops/dispatch.h"

namespace lean {
namespace {

// A call's arguments by name, as the op has them; lean_attention.append_kv documents them.
struct AppendArgs {
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& k;
  const Tensor& v;
  const OptionalTensor& seq_lens;
  const OptionalTensor& block_table;
  const OptionalTensor& cache_batch_idx;
  const OptionalTensor& cu_seqlens;
  const OptionalTensor& q;
  const OptionalTensor& rotary_cos;
  const OptionalTensor& rotary_sin;
  bool rotary_interleaved;
  const OptionalTensor& k_scale;
  const OptionalTensor& v_scale;
  const OptionalTensor& slot_mapping;
};

// A call's parameters and the tensors that they point into.
class AppendCall {
 public:
  // Throws std::invalid_argument where arguments do not fit. Numbers inside tensors are the backend's to
  // check.
  explicit AppendCall(const AppendArgs& args)
      : a_(args),
        k_{"append_kv", "k", args.k},
        k_cache_{"append_kv", "k_cache", args.k_cache},
        v_cache_{"append_kv", "v_cache", args.v_cache},
        packed_(args.cu_seqlens.has_value() || args.slot_mapping.has_value()) {
    if (a_.slot_mapping) refuse_beside_slots();
    take_tokens();
    take_caches();
    take_lengths();
    take_pages();
    take_rotary();
    p.k_cache.scale = row_scales("k_scale", a_.k_scale, k_cache_);
    p.v_cache.scale = row_scales("v_scale", a_.v_scale, v_cache_);
    check_shared_memory();
  }

  AppendParams p{};

 private:
  void take_tokens() {
    const Argument v{"append_kv", "v", a_.v};
    k_cache_.has_shape(cache_layout(), 4);
    v_cache_.has_shape(cache_layout(), 4);
    check_new("[batch, tokens, num_kv_heads, head_dim]", k_);
    check_new("[batch, tokens, num_kv_heads, head_dim_v]", v);
    const int64_t last = k_.tensor.dim() - 1;
    for (int64_t dim = 0; dim < last; ++dim) v.has_size(dim, a_.k.size(dim), "like k");
    const auto quantised = quantised_dtype_of(a_.k);
    p.dtype = quantised ? *quantised : dtype_of(k_);
    v.has_dtype(a_.k.scalar_type(), ", like k");
    p.num_kv_heads = a_.k.size(last - 1);
    p.tokens = a_.k.size(last - 2);
    p.batch = a_.slot_mapping ? 1 : packed_ ? a_.cu_seqlens->numel() - 1 : a_.k.size(0);
    p.k = new_rows(a_.k, a_.k.const_data_ptr());
    p.v = new_rows(a_.v, a_.v.const_data_ptr());
  }

  void take_caches() {
    const Tensor& k_cache = a_.k_cache;
    const bool quantises = !quantised_dtype_of(a_.k) && quantised_dtype_of(k_cache);
    if ((a_.block_table || a_.slot_mapping) && k_cache.size(1) == 0) {
      fail("append_kv: k_cache has a block_size of 0; it must be at least 1");
    }
    for (const Argument& cache : {k_cache_, v_cache_}) {
      if (quantises) {
        cache.has_dtype(k_cache.scalar_type(), ", like k_cache");
      } else {
        cache.has_dtype(a_.k.scalar_type(), ", like k");
      }
      cache.has_size(0, k_cache.size(0), "like k_cache");
      cache.has_size(1, k_cache.size(1), "like k_cache");
      cache.has_size(2, p.num_kv_heads, "the num_kv_heads of k");
      cache.has_contiguous_rows();
      cache.has_memory_of_its_own();
      cache.is_on_device_of(k_);
    }
    const int64_t last = a_.k.dim() - 1;
    k_cache_.has_size(3, a_.k.size(last), "the head_dim of k");
    v_cache_.has_size(3, a_.v.size(last), "the head_dim of v");
    const DType dtype = quantises ? *quantised_dtype_of(k_cache) : p.dtype;
    p.k_cache = cache_view<WritableCacheView>(k_cache, dtype, k_cache.mutable_data_ptr());
    p.v_cache = cache_view<WritableCacheView>(a_.v_cache, dtype, a_.v_cache.mutable_data_ptr());
  }

  // A slot says where a token goes, and nothing of its position.
  void refuse_beside_slots() const {
    const std::pair<const char*, const OptionalTensor&> others[] = {{"seq_lens", a_.seq_lens},
                                                                    {"block_table", a_.block_table},
                                                                    {"cache_batch_idx", a_.cache_batch_idx},
                                                                    {"cu_seqlens", a_.cu_seqlens},
                                                                    {"rotary_cos", a_.rotary_cos},
                                                                    {"rotary_sin", a_.rotary_sin},
                                                                    {"q", a_.q}};
    for (const auto& [name, tensor] : others) {
      if (tensor) {
        fail("append_kv: ", name,
             " cannot be combined with slot_mapping, which says where each token goes "
             "and not its position");
      }
    }
  }

  void take_slots() {
    const Argument arg{"append_kv", "slot_mapping", *a_.slot_mapping};
    arg.is_list_of("[total]", p.tokens, "the tokens of k");
    arg.has_dtype_of_indices();
    arg.is_on_device_of(k_);
    p.slots = indices(arg.tensor, copies_.contiguous(arg.tensor));
  }

  void take_lengths() {
    if (a_.slot_mapping) return take_slots();
    if (!a_.seq_lens) fail("append_kv: seq_lens is missing; without slot_mapping it says where tokens go");
    if (p.batch < 0) fail("append_kv: cu_seqlens is empty; it must have batch + 1 entries");
    p.seq_lens = list("seq_lens", "[batch]", *a_.seq_lens, p.batch);
    if (packed_) p.cu_seqlens = list("cu_seqlens", "[batch + 1]", *a_.cu_seqlens, p.batch + 1);
  }

  void take_pages() {
    p.pages = page_table({.k_cache = k_cache_,
                          .block_table = a_.block_table,
                          .cache_batch_idx = a_.cache_batch_idx,
                          .takes_tables_per_head = false,
                          .tokens = k_,
                          .batch = p.batch,
                          .batch_is = "the batch size of k"});
    if (a_.cache_batch_idx) {
      p.pages.cache_batch_idx = list("cache_batch_idx", "[batch]", *a_.cache_batch_idx, p.batch);
    } else if (!a_.block_table && !a_.slot_mapping) {
      k_cache_.has_size(0, p.batch, "the batch size of k");
    }
  }

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

  void check_new(const char* layout, const Argument& arg) const {
    if (packed_) {
      arg.has_shape(
          a_.slot_mapping ? "[total, heads, dim] with slot_mapping" : "[total, heads, dim] with cu_seqlens",
          3);
    } else {
      arg.has_shape(layout, 4);
    }
    arg.has_contiguous_rows();
    arg.is_on_device_of(k_);
  }

  void take_rotary() {
    const OptionalTensor &q = a_.q, &cos = a_.rotary_cos, &sin = a_.rotary_sin;
    if (cos.has_value() != sin.has_value()) {
      fail("append_kv: rotary_", cos ? "sin" : "cos", " is missing; rotary_cos and rotary_sin come together");
    }
    if (q && !cos)
      fail("append_kv: q is given without rotary_cos and rotary_sin; there is nothing to do to it");
    if (!cos) return;
    if (quantised_dtype_of(k_.tensor)) {
      fail("append_kv: k is ", name_of(k_.tensor.scalar_type()),
           "; rotary embedding needs torch.float32, torch.float16 or torch.bfloat16");
    }
    const Argument cos_arg{"append_kv", "rotary_cos", *cos}, sin_arg{"append_kv", "rotary_sin", *sin};
    for (const Argument& table : {cos_arg, sin_arg}) {
      table.has_shape("[max_position, rotary_dim / 2]", 2);
      table.has_size(0, cos->size(0), "like rotary_cos");
      table.has_size(1, cos->size(1), "like rotary_cos");
      if (table.tensor.scalar_type() != ScalarType::Float)
        table.has_dtype(k_.tensor.scalar_type(), ", like k, or torch.float32");
      table.has_dtype(cos->scalar_type(), ", like rotary_cos");
      table.has_contiguous_rows();
      table.is_on_device_of(k_);
    }
    p.cos = cos->const_data_ptr();
    p.sin = sin->const_data_ptr();
    p.cos_stride = cos->stride(0);
    p.sin_stride = sin->stride(0);
    p.rotary_dtype = dtype_of(cos_arg);
    p.interleaved = a_.rotary_interleaved;
    p.max_position = cos->size(0);
    p.rotary_dim = 2 * cos->size(1);
    if (p.rotary_dim > p.k_cache.dims) {
      fail("append_kv: rotary_cos has shape ", shape_of(*cos), ", which rotates ", p.rotary_dim,
           " dims; k has ", p.k_cache.dims);
    }
    if (!q) return;
    const Argument q_arg{"append_kv", "q", *q};
    check_new("[batch, tokens, num_heads, head_dim]", q_arg);
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
    const std::string new_dtype = name_of(k_.tensor.scalar_type()),
                      dtype = name_of(cache.tensor.scalar_type());
    if (!scales) {
      if (!p.quantises()) return {};
      fail("append_kv: ", name, " is missing; ", cache.name, " is ", dtype, " and k is ", new_dtype,
           ", so rows are quantised and it takes their scales");
    }
    const Argument arg{"append_kv", name, *scales};
    if (!p.quantises()) {
      fail("append_kv: ", name, " is given, and k is ", new_dtype, ", as is ", cache.name,
           "; scales are written where a quantised cache takes tokens that are torch.float32, torch.float16 "
           "or "
           "torch.bfloat16");
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

  Indices list(const char* name, const char* layout, const Tensor& tensor, int64_t size) {
    const Argument arg{"append_kv", name, tensor};
    arg.is_list_of(layout, size, "the batch size of k (cu_seqlens: and one more)");
    arg.has_dtype_of_indices();
    arg.is_on_device_of(k_);
    return indices(tensor, copies_.contiguous(tensor));
  }

  const char* cache_layout() const {
    return a_.block_table || a_.slot_mapping ? "[num_blocks, block_size, num_kv_heads, head_dim]"
                                             : "[batch, max_len, num_kv_heads, head_dim]";
  }

  template <class Data>
  NewRowsOf<Data> new_rows(const Tensor& t, Data* data) const {
    const int64_t first = packed_ ? 0 : 1;
    return {.data = data,
            .batch_stride = packed_ ? 0 : t.stride(0),
            .token_stride = t.stride(first),
            .head_stride = t.stride(first + 1)};
  }

  const AppendArgs& a_;
  const Argument k_, k_cache_, v_cache_;
  const bool packed_;
  Copies copies_;
};

void append_kv(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v,
               const OptionalTensor& seq_lens, const OptionalTensor& block_table,
               const OptionalTensor& cache_batch_idx, const OptionalTensor& cu_seqlens, OptionalTensor q,
               const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin, bool rotary_interleaved,
               OptionalTensor k_scale, OptionalTensor v_scale, const OptionalTensor& slot_mapping) {
  const AppendArgs args{.k_cache = k_cache,
                        .v_cache = v_cache,
                        .k = k,
                        .v = v,
                        .seq_lens = seq_lens,
                        .block_table = block_table,
                        .cache_batch_idx = cache_batch_idx,
                        .cu_seqlens = cu_seqlens,
                        .q = q,
                        .rotary_cos = rotary_cos,
                        .rotary_sin = rotary_sin,
                        .rotary_interleaved = rotary_interleaved,
                        .k_scale = k_scale,
                        .v_scale = v_scale,
                        .slot_mapping = slot_mapping};
  const AppendCall call(args);
  if (call.p.all_tokens() * call.p.rows_per_token() == 0) return;
  dispatch({"append_kv", "k", k},
           [&](const Backend& backend, const Queue& queue) { backend.append_kv(call.p, queue); });
}

}  // namespace
}  // namespace lean

STABLE_TORCH_LIBRARY_FRAGMENT(LEAN_OP_LIBRARY, m) {
  m.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? seq_lens=None, "
      "Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? cu_seqlens=None, Tensor(c!)? q=None, "
      "Tensor? rotary_cos=None, Tensor? rotary_sin=None, *, bool rotary_interleaved=False, "
      "Tensor(d!)? k_scale=None, Tensor(e!)? v_scale=None, Tensor? slot_mapping=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_OP_LIBRARY, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&lean::append_kv));
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_OP_LIBRARY, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&lean::append_kv));
}
