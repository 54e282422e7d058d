#include "cpu/parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace lean::cpu {
namespace {

// OpenMP's threads do not come along when a process forks, and GNU's library then waits for them for ever. So
// a child of a process that has used them here keeps to its one thread.
std::atomic<bool> pool_used{false};
std::atomic<bool> pool_lost{false};
const int watch_forks =
    pthread_atfork(nullptr, nullptr, [] { pool_lost.store(pool_used.load(std::memory_order_relaxed)); });

}  // namespace

int64_t num_threads() {
  return pool_lost.load(std::memory_order_relaxed) ? 1 : torch::stable::get_num_threads();
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& work) {
  if (count == 1 || num_threads() == 1) {  // entering the pool costs microseconds
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  pool_used.store(true, std::memory_order_relaxed);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

}  // namespace lean::cpu
