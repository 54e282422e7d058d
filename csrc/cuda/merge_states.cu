// Merging normalised partial outputs by their log-sum-exps, a row per CTA and turn.
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/host.h"
#include "cuda/ptx.h"
#include "fail.h"
#include "softmax_state.h"

namespace lean::cuda {
namespace {

constexpr int kMergeThreads = 128;
constexpr int64_t kMaxMergeCtas = 4096;
constexpr int64_t kMaxStates = 128;

struct MergeArguments {
  MergeParams p;  // its arrays of pointers are the host's
  const void* outs[kMaxStates];
  const float* lses[kMaxStates];
};

LEAN_DEVICE void store_merged(const MergeParams& p, int64_t i, float value) {
  if (p.out_dtype == DType::float32) {
    static_cast<float*>(p.out)[i] = value;
  } else if (p.out_dtype == DType::float16) {
    static_cast<hw::Half*>(p.out)[i] = hw::Numbers::from_float<hw::Half>(value);
  } else {
    static_cast<hw::BFloat16*>(p.out)[i] = hw::Numbers::from_float<hw::BFloat16>(value);
  }
}

template <class T>
LEAN_KERNEL(kMergeThreads, 1)
merge_kernel(LEAN_KERNEL_PARAMETER MergeArguments arguments) {
  const MergeParams& p = arguments.p;
  for (int64_t row = hw::cta_index(); row < p.batch * p.q_len * p.num_heads; row += hw::num_ctas()) {
    const int64_t head = row % p.num_heads, token = row / p.num_heads % p.q_len,
                  sequence = row / p.num_heads / p.q_len;
    const int64_t lse_index = (sequence * p.num_heads + head) * p.q_len + token;
    for (int64_t d = hw::thread_index(); d < p.head_dim_v; d += kMergeThreads) {
      SoftmaxState state;
      float sum = 0.0f;
      for (int64_t i = 0; i < p.num_states; ++i) {
        const SoftmaxState next = from_log_sum_exp(arguments.lses[i][lse_index]);
        if (next.l == 0.0f) continue;  // whatever is in the output of an empty state
        const Merged merged = merge(state, next, p.log2_base);
        const float out =
            hw::Numbers::to_float(static_cast<const T*>(arguments.outs[i])[row * p.head_dim_v + d]);
        sum = sum * merged.weight_a + out * merged.weight_b;
        state = merged.state;
      }
      store_merged(p, row * p.head_dim_v + d, sum * normaliser(state.l));
      if (d == 0) p.lse[lse_index] = log_sum_exp_to(state, p.log2_base);
    }
  }
}

}  // namespace

void merge_states(const MergeParams& p, const Queue& queue) {
  if (p.num_states > kMaxStates) {
    fail("merge_states: outs has ", p.num_states, " tensors; on cuda there may be ", kMaxStates);
  }
  MergeArguments arguments{p, {}, {}};
  std::copy_n(p.outs, p.num_states, arguments.outs);
  std::copy_n(p.lses, p.num_states, arguments.lses);
  void (*kernel)(MergeArguments) = p.dtype == DType::float16    ? &merge_kernel<hw::Half>
                                   : p.dtype == DType::bfloat16 ? &merge_kernel<hw::BFloat16>
                                                                : &merge_kernel<float>;
  const int64_t ctas = std::min(p.batch * p.q_len * p.num_heads, kMaxMergeCtas);
  hw::launch(kernel, arguments, ctas, kMergeThreads, 0, queue.stream);
}

}  // namespace lean::cuda
