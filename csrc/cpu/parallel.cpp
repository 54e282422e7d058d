#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace lean::cpu {

int64_t num_threads() {
  return torch::stable::get_num_threads();
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& work) {
  if (count == 1) return work(0);  // entering the pool costs microseconds
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

}  // namespace lean::cpu
