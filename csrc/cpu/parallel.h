// Torch's own thread pool, so that torch.set_num_threads and OMP_NUM_THREADS hold here too.
#pragma once

#include <cstdint>
#include <functional>

namespace lean::cpu {

int64_t num_threads();

// Calls work(0) ... work(count - 1), each once, on up to num_threads() threads. Inside another
// parallel region, or with one thread, they run one after another.
void parallel_for(int64_t count, const std::function<void(int64_t)>& work);

}  // namespace lean::cpu
