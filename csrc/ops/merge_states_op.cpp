// merge_states: partial attention into one.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "ops/dispatch.h"

namespace lean {
namespace {

std::tuple<Tensor, Tensor> merge_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                                        double base, std::optional<ScalarType> out_dtype) {
  if (outs.empty()) fail("merge_states: outs is empty; there must be at least one state");
  if (outs.size() != lses.size()) {
    fail("merge_states: outs has ", outs.size(), " tensors, lses ", lses.size(), "; there must be as many");
  }
  const Argument first{"merge_states", "outs[0]", outs[0]};
  if (!(base > 1.0) || !std::isfinite(base)) {
    fail("merge_states: base is ", base, "; it must be a finite number above 1");
  }
  const ScalarType dtype = out_dtype.value_or(outs[0].scalar_type());
  // Packed states are those of one sequence.
  const int64_t packed = outs[0].dim() == 3 ? 1 : 0;
  const int64_t rank = 4 - packed;
  if (!packed)
    first.has_shape("[batch, q_len, num_heads, head_dim_v], or [total_q, num_heads, head_dim_v]", 4);
  MergeParams params{};
  params.dtype = dtype_of(first);
  params.out_dtype = dtype_of("merge_states", "out_dtype", dtype);
  params.num_states = static_cast<int64_t>(outs.size());
  params.batch = packed ? 1 : outs[0].size(0);
  params.q_len = outs[0].size(1 - packed);
  params.num_heads = outs[0].size(2 - packed);
  params.head_dim_v = outs[0].size(3 - packed);
  params.log2_base = static_cast<float>(std::log2(base));
  Copies copies;
  std::vector<const void*> out_pointers;
  std::vector<const float*> lse_pointers;
  for (size_t i = 0; i < outs.size(); ++i) {
    const std::string out_name = "outs[" + std::to_string(i) + "]",
                      lse_name = "lses[" + std::to_string(i) + "]";
    const Argument out{"merge_states", out_name.c_str(), outs[i]},
        lse{"merge_states", lse_name.c_str(), lses[i]};
    out.has_shape("like outs[0]", rank);
    lse.has_shape(packed ? "[num_heads, total_q]" : "[batch, num_heads, q_len]", rank - 1);
    out.has_dtype(outs[0].scalar_type(), ", like outs[0]");
    lse.has_dtype(ScalarType::Float, "");
    out.is_on_device_of(first);
    lse.is_on_device_of(first);
    for (int64_t dim = 0; dim < rank; ++dim) out.has_size(dim, outs[0].size(dim), "like outs[0]");
    if (!packed) lse.has_size(0, params.batch, "the batch size of outs");
    lse.has_size(1 - packed, params.num_heads, "the num_heads of outs");
    lse.has_size(2 - packed, params.q_len, "the query tokens of outs");
    out_pointers.push_back(copies.contiguous(outs[i]));
    lse_pointers.push_back(static_cast<const float*>(copies.contiguous(lses[i])));
  }
  Tensor out = torch::stable::new_empty(outs[0], outs[0].sizes(), dtype);
  Tensor lse = torch::stable::new_empty(lses[0], lses[0].sizes());
  params.outs = out_pointers.data();
  params.lses = lse_pointers.data();
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (out.numel() > 0) {
    dispatch(first, [&](const Backend& backend, const Queue& queue) { backend.merge_states(params, queue); });
  }
  return {out, lse};
}

}  // namespace
}  // namespace lean

STABLE_TORCH_LIBRARY_FRAGMENT(LEAN_OP_LIBRARY, m) {
  m.def(
      "merge_states(Tensor[] outs, Tensor[] lses, *, float base=2.718281828459045, ScalarType? "
      "out_dtype=None) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_OP_LIBRARY, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&lean::merge_states));
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_OP_LIBRARY, CUDA, m) {
  m.impl("merge_states", TORCH_BOX(&lean::merge_states));
}
