// The second cache level of a core, which holds what its thread reads next.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace lean::cpu {

struct SecondLevel {
  int64_t bytes;
  int64_t ways;
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

}  // namespace lean::cpu
