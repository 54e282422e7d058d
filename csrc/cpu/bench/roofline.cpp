#include "cpu/bench/roofline.h"

#include <atomic>

#include "cpu/kernels/tile_kernel.h"
#include "cpu/parallel.h"
#include "schedule.h"

namespace lean::cpu {

uint64_t read_loop(const void* memory, int64_t bytes) {
  typedef uint64_t Vector __attribute__((vector_size(16), may_alias));
  constexpr int64_t kLine = 64, kVectorsPerLine = kLine / sizeof(Vector);
  constexpr int64_t kPrefetchDistance =
      64 * kLine;  // which reads faster than what hardware prefetchers do alone
  const auto* vectors = static_cast<const Vector*>(memory);
  const Grid grid{num_threads(), bytes / kLine};
  std::atomic<uint64_t> all{0};
  parallel_for(grid.num_ctas, [&](int64_t thread) {
    const LeanRange lines = grid.range(thread);
    Vector sums[kVectorsPerLine] = {};
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      __builtin_prefetch(static_cast<const char*>(memory) + line * kLine + kPrefetchDistance);
      for (int64_t i = 0; i < kVectorsPerLine; ++i) sums[i] ^= vectors[line * kVectorsPerLine + i];
    }
    for (int64_t i = 1; i < kVectorsPerLine; ++i) sums[0] ^= sums[i];
    all.fetch_xor(sums[0][0] ^ sums[0][1], std::memory_order_relaxed);
  });
  return all.load();
}

int64_t fma_loop(DType dtype, int64_t rounds, int64_t rows) {
  const TileKernel& kernel = tile_kernel(dtype, dtype, rows);
  std::atomic<int64_t> products{0};
  parallel_for(num_threads(), [&](int64_t) { products += kernel.fma_loop(rounds); });
  return products.load();
}

}  // namespace lean::cpu
