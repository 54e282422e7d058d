// Memory that the CTAs of a launch share: words that they tell each other things through, and what those
// order.
#pragma once

#if !defined(__CUDACC__)

#include "emulated_hardware.h"

#else

#include <cstdint>
#include <cuda/atomic>

#include "cuda/ptx.h"

namespace lean::hw {

// Words in global memory that CTAs tell each other things through.
using DeviceWord = ::cuda::atomic_ref<uint64_t, ::cuda::thread_scope_device>;

LEAN_DEVICE uint64_t load_relaxed(uint64_t* word) {
  return DeviceWord(*word).load(::cuda::memory_order_relaxed);
}
LEAN_DEVICE uint64_t load_acquire(uint64_t* word) {
  return DeviceWord(*word).load(::cuda::memory_order_acquire);
}
LEAN_DEVICE void store_relaxed(uint64_t* word, uint64_t value) {
  DeviceWord(*word).store(value, ::cuda::memory_order_relaxed);
}
LEAN_DEVICE void store_release(uint64_t* word, uint64_t value) {
  DeviceWord(*word).store(value, ::cuda::memory_order_release);
}
LEAN_DEVICE uint64_t fetch_add_relaxed(uint64_t* word, uint64_t value) {
  return DeviceWord(*word).fetch_add(value, ::cuda::memory_order_relaxed);
}
LEAN_DEVICE void compare_exchange_relaxed(uint64_t* word, uint64_t expected, uint64_t desired) {
  DeviceWord(*word).compare_exchange_strong(expected, desired, ::cuda::memory_order_relaxed);
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

}  // namespace lean::hw

#endif
