// The caches of a core, which hold what its thread reads next.
#pragma once

#include <unistd.h>

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lean::cpu {

struct SecondLevel {
  int64_t bytes;
  int64_t ways;

  // Whether rows that were asked for seldom push each other out before it is full.
  bool has_many_ways() const { return ways >= 16; }
};

// As the system tells; where it does not, a common one.
inline const SecondLevel& second_level() {
  static const SecondLevel level = [] {
    SecondLevel told{0, 0};
#if defined(_SC_LEVEL2_CACHE_SIZE)
    told = {sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_ASSOC)};
#endif
    return told.bytes > 0 ? told : SecondLevel{1024 * 1024, 8};
  }();
  return level;
}

// Whether a core reads memory fastest through its first level: what it asks for there, and shortly before it
// is read. So does AMD's Zen 5 (family 1Ah). Its predecessor has more reads in flight in the second level,
// for which rows are asked longer ahead than the first could hold them.
inline bool reads_through_first_level() {
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
