#include "cpu/tuning.h"

#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lean::cpu {
namespace {

constexpr int64_t kKilobyte = 1024;

// AMD's family 1Ah: L1 of 48 KB, L2 of 1 MB in 16 ways. (Zen 6 is of that family too, and unmeasured.)
constexpr Tuning zen5() {
  return {
      .name = "zen5",
      .prefetch_level = 1,
      .touch_tokens = 64,
      .fp32_prefetch_level = 1,
      .fp32_touch_tokens = 64,
      .max_pass_bytes = 1024 * kKilobyte,
      .max_long_run_bytes = 256 * kKilobyte,
      .max_heads_per_pass = 32,
      .max_heads_per_pass_in_pages = 8,
      .min_thread_bytes = 128 * kKilobyte,
      .min_range_bytes = 256 * kKilobyte,
      .bytes_per_published_byte = 16,
      .bytes_read_per_merged_byte = 64,
      .min_tiles_per_thread = 2,
      .multiplies_in_fp32 = false,
  };
}

// AMD's family 19h with AVX-512: L1 of 32 KB, L2 of 1 MB in 8 ways.
constexpr Tuning zen4() {
  Tuning row = zen5();
  row.name = "zen4";
  row.prefetch_level = row.fp32_prefetch_level = 2;
  row.touch_tokens = row.fp32_touch_tokens = 512;
  row.max_pass_bytes = 256 * kKilobyte;
  row.max_long_run_bytes = 192 * kKilobyte;
  return row;
}

// All other cores. Unmeasured: it prefetches as zen4 does, and takes the shares of L2 that serve zen4 where
// L2 has few ways, half of L2 for a pass and zen5's quarter for long runs where it has 16 or more.
Tuning generic(const L2Cache& l2) {
  const bool many_ways = l2.ways >= 16;
  Tuning row = zen4();
  row.name = "generic";
  row.max_pass_bytes = many_ways ? l2.bytes / 2 : l2.bytes / 4;
  row.max_long_run_bytes = many_ways ? l2.bytes / 4 : l2.bytes / 16 * 3;
  return row;
}

// Intel's. Measured on a Xeon with AMX: L1 of 48 KB, L2 of 2 MB in 16 ways.
Tuning intel(const L2Cache& l2) {
  Tuning row = generic(l2);
  row.name = "intel";
  row.prefetch_level = 1;
  row.touch_tokens = 0;
  row.multiplies_in_fp32 = true;
  return row;
}

// From sysconf; 1 MB in 8 ways where that does not say.
L2Cache l2_cache() {
  L2Cache l2{0, 0};
#if defined(_SC_LEVEL2_CACHE_SIZE)
  l2 = {sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_ASSOC)};
#endif
  return l2.bytes > 0 ? l2 : L2Cache{1024 * kKilobyte, 8};
}

std::string row_of_this_machine() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (__builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d)) {
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
    if (family >= 0x1a) return "zen5";
    if (family == 0x19 && __builtin_cpu_supports("avx512f")) return "zen4";
  }
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "generic";
}

}  // namespace

std::vector<Tuning> tuning_rows(const L2Cache& l2) {
  return {zen5(), zen4(), intel(l2), generic(l2)};
}

const Tuning& tuning(const std::string& name) {
  static const std::vector<Tuning> rows = tuning_rows(l2_cache());
  static const std::string own = row_of_this_machine();
  const std::string& wanted = name.empty() ? own : name;
  for (const Tuning& row : rows) {
    if (wanted == row.name) return row;
  }
  std::string names;
  for (const Tuning& row : rows) names += (names.empty() ? "" : " ") + std::string(row.name);
  throw std::invalid_argument("LEAN_ATTENTION_TUNING: unknown row " + name + " (rows: " + names + ")");
}

const Tuning& tuning() {
  const char* forced = std::getenv("LEAN_ATTENTION_TUNING");
  return tuning(forced == nullptr ? "" : forced);
}

}  // namespace lean::cpu
