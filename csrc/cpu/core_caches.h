// The caches of a core, and which of them it reads memory through.
#pragma once

#include <unistd.h>

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lean::cpu {

struct L2Cache {
  int64_t bytes;
  int64_t ways;

  // With 16 ways or more, prefetched lines survive until L2 is full; with 8, until it is half full.
  bool has_many_ways() const { return ways >= 16; }
};

// The numbers are sysconf's; where it has none, an L2 of 1 MB and 8 ways is assumed.
inline const L2Cache& l2_cache() {
  static const L2Cache level = [] {
    L2Cache told{0, 0};
#if defined(_SC_LEVEL2_CACHE_SIZE)
    told = {sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_ASSOC)};
#endif
    return told.bytes > 0 ? told : L2Cache{1024 * 1024, 8};
  }();
  return level;
}

// A core may read memory fastest if lines are prefetched into L1, shortly before they are read: AMD's Zen 5
// (family 1Ah) does. Its predecessor has more reads in flight into L2, for which rows are prefetched longer
// beforehand than L1 could hold them.
inline bool prefetches_into_l1() {
#if defined(__x86_64__)
  static const bool reads = [] {
    unsigned a, b, c, d;
    if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
    return family >= 0x1a;
  }();
  return reads;
#else
  return false;
#endif
}

}  // namespace lean::cpu
