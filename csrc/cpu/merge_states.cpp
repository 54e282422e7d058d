// Merges normalised partial outputs by their log-sum-exps.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "cpu/backend.h"
#include "cpu/parallel.h"
#include "softmax_state.h"

namespace lean::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
void write_row(const MergeParams& p, int64_t row, const std::vector<float>& sum, float factor) {
  T* out = static_cast<T*>(p.out) + row * p.head_dim_v;
  for (int64_t d = 0; d < p.head_dim_v; ++d) out[d] = static_cast<T>(sum[d] * factor);
}

template <class T>
void merge_row(const MergeParams& p, int64_t row, int64_t lse_index, std::vector<float>& sum) {
  SoftmaxState state;
  sum.assign(p.head_dim_v, 0.0f);
  for (int64_t i = 0; i < p.num_states; ++i) {
    const SoftmaxState next = from_log_sum_exp(p.lses[i][lse_index]);
    if (next.l == 0.0f) continue;  // whatever is in the output of an empty state
    const Merged merged = merge(state, next, p.log2_base);
    state = merged.state;
    const T* out = static_cast<const T*>(p.outs[i]) + row * p.head_dim_v;
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
      sum[d] = sum[d] * merged.weight_a + static_cast<float>(out[d]) * merged.weight_b;
    }
  }
  const auto write = p.out_dtype == DType::float32   ? write_row<float>
                     : p.out_dtype == DType::float16 ? write_row<Half>
                                                     : write_row<BFloat16>;
  write(p, row, sum, normaliser(state.l));
  p.lse[lse_index] = log_sum_exp_to(state, p.log2_base);
}

template <class T>
void merge_all(const MergeParams& p) {
  parallel_for(p.batch, [&](int64_t b) {
    std::vector<float> sum;
    for (int64_t token = 0; token < p.q_len; ++token) {
      for (int64_t head = 0; head < p.num_heads; ++head) {
        merge_row<T>(p, (b * p.q_len + token) * p.num_heads + head,
                     (b * p.num_heads + head) * p.q_len + token, sum);
      }
    }
  });
}

}  // namespace

void merge_states(const MergeParams& p) {
  switch (p.dtype) {
    case DType::float32:
      return merge_all<float>(p);
    case DType::float16:
      return merge_all<Half>(p);
    default:
      return merge_all<BFloat16>(p);
  }
}

}  // namespace lean::cpu
