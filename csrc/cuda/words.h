// Memory that the CTAs of a launch share: words that they tell each other things through, and what those
// order.
#pragma once

#if !defined(__CUDACC__)

#include "emulated_hardware.h"

#else

#include <cstdint>

#include "cuda/ptx.h"

namespace lean::hw {

// In PTX, because atomics of C++ on an address that could be in shared memory come with code for both.
LEAN_DEVICE uint64_t load_relaxed(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return value;
}
// What a thread loads after it is ordered after what was stored before a release that it has seen the value
// of.
LEAN_DEVICE void fence_acquire() {
  asm volatile("fence.acq_rel.gpu;" : : : "memory");
}
LEAN_DEVICE void store_relaxed(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(word)), "l"(value)
               : "memory");
}
LEAN_DEVICE void store_release(uint64_t* word, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(word)), "l"(value)
               : "memory");
}
LEAN_DEVICE uint64_t fetch_add_relaxed(uint64_t* word, uint64_t value) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(word)), "l"(value)
               : "memory");
  return before;
}
LEAN_DEVICE void compare_exchange_relaxed(uint64_t* word, uint64_t expected, uint64_t desired) {
  [[maybe_unused]] uint64_t before;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(word)), "l"(expected), "l"(desired)
               : "memory");
}
LEAN_DEVICE void pause(unsigned nanoseconds) {
  __nanosleep(nanoseconds);
}

// Plain accesses to global memory that other CTAs write or read in the same launch; ordered by the words
// above and by nothing else.
template <class V>
LEAN_DEVICE V load_shared_between_ctas(const V* from) {
  return *from;
}
template <class V>
LEAN_DEVICE void store_shared_between_ctas(V* to, V value) {
  *to = value;
}
// In PTX, because nvcc would make four stores of it.
template <>
LEAN_DEVICE void store_shared_between_ctas(Float4* to, Float4 value) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

}  // namespace lean::hw

#endif
