// Products are rounded before they are added, also where the compiler could fuse the two: on all machines
// rows are rotated to the same bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "append.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/backend.h"
#include "cpu/check_values.h"
#include "cpu/kernels/registry.h"
#include "cpu/parallel.h"
#include "fail.h"
#include "quantise.h"

namespace lean::cpu {
namespace {

// With fewer bytes another thread costs more than it brings.
constexpr int64_t kMinBytesPerThread = 256 * 1024;

// Refuses two new tokens for one slot. Tokens of neighbouring slots are compared as one run: there are few.
class Destinations {
 public:
  explicit Destinations(const AppendParams& p) : p_(p) {}

  void add(const NewToken& t) {
    // Every sequence has a slot of its own.
    if (!p_.pages.block_table && !p_.pages.cache_batch_idx && !p_.slots) return;
    const int64_t place = place_of(t);
    if (!runs_.empty() && runs_.back().end == place) {
      ++runs_.back().end;
    } else {
      runs_.push_back({place, place + 1});
    }
  }

  void check() {
    const auto earlier = [](const TokenSpan& a, const TokenSpan& b) { return a.begin < b.begin; };
    const auto overlap = [](const TokenSpan& a, const TokenSpan& b) { return b.begin < a.end; };
    std::sort(runs_.begin(), runs_.end(), earlier);
    if (std::adjacent_find(runs_.begin(), runs_.end(), overlap) != runs_.end()) report();
  }

 private:
  // Slots are numbered through all blocks.
  int64_t place_of(const NewToken& t) const { return t.block * p_.pages.block_size + t.slot; }

  [[noreturn]] void report() const {
    std::unordered_map<int64_t, NewToken> taken;
    for (int64_t token = 0;; ++token) {
      const NewToken t = new_token(p_, token);
      if (t.sequence < 0) continue;
      const auto [other, is_new] = taken.try_emplace(place_of(t), t);
      if (is_new) continue;
      if (p_.slots) {
        fail("append_kv: slot_mapping[", t.index, "] is ", p_.slots[t.index], ", as is slot_mapping[",
             other->second.index, "]; each new token must have a place of its own");
      }
      fail("append_kv: ", name_of(t), " is ", t.block, ", as is ", name_of(other->second),
           ", and a new token of each would go to slot ", t.slot,
           " there; each must have a place of its own");
    }
  }

  std::string name_of(const NewToken& t) const {
    std::ostringstream text;
    if (p_.pages.block_table) {
      text << "block_table[" << t.sequence << ", " << t.position / p_.pages.block_size << "]";
    } else {
      text << "cache_batch_idx[" << t.sequence << "]";
    }
    return text.str();
  }

  const AppendParams& p_;
  std::vector<TokenSpan> runs_;
};

struct Numbers {
  template <class T>
  static float to_float(T x) {
    return static_cast<float>(x);
  }
  template <class T>
  static T from_float(float x) {
    return static_cast<T>(x);
  }
  static float multiply(float a, float b) { return a * b; }
  static float divide(float a, float b) { return a / b; }
};

// `values` has room for the row.
template <class T, DType kCacheDType>
void quantise_row(const AppendParams& p, const NewToken& t, const NewRow& row, float* __restrict values) {
  for_each_element<Numbers, T>(p, t, row, 0, 1,
                               [values](int64_t i, T x) { values[i] = Numbers::to_float(x); });
  const int64_t dims = row.dims;
  int32_t largest = 0;
  for (int64_t i = 0; i < dims; ++i) largest = std::max(largest, magnitude_bits(values[i]));
  const float scale = *row.scale = scale_of_row<Numbers>(kCacheDType, largest);
  uint8_t* const __restrict to = static_cast<uint8_t*>(row.to);
  if (scale > 0.0f) {
    for (int64_t i = 0; i < dims; ++i) to[i] = quantised<Numbers, kCacheDType>(values[i], scale);
  } else {
    std::fill_n(to, dims, filling_of(kCacheDType, scale));
  }
}

#if defined(LEAN_X86)
// The same with vectors of 8.
template <class T, DType kCacheDType>
__attribute__((target("avx2"), flatten)) void quantise_row_avx2(const AppendParams& p, const NewToken& t,
                                                                const NewRow& row, float* values) {
  quantise_row<T, kCacheDType>(p, t, row, values);
}
#endif

using QuantiseRow = void (*)(const AppendParams&, const NewToken&, const NewRow&, float*);

// Null where rows of T are only copied.
template <class T, DType kCacheDType>
QuantiseRow quantise_row_function() {
  if constexpr (sizeof(T) > 1) {
#if defined(LEAN_X86)
    const std::string chosen = tile_kernel(DType::float32, DType::float32).instruction_set;
    if (chosen != "portable") return &quantise_row_avx2<T, kCacheDType>;
#endif
    return &quantise_row<T, kCacheDType>;
  } else {
    return nullptr;
  }
}

// kCacheDType: what rows are quantised to, if they are.
template <class T, DType kCacheDType>
void append_all(const AppendParams& p) {
  const int64_t tokens = p.all_tokens(), bytes = p.rows_per_token() * p.k_cache.dims * sizeof(T);
  const QuantiseRow quantise = p.quantises() ? quantise_row_function<T, kCacheDType>() : nullptr;
  const int64_t parts = std::clamp<int64_t>(tokens * bytes / kMinBytesPerThread, 1, num_threads());
  parallel_for(parts, [&](int64_t part) {
    std::vector<float> values(p.quantises() ? std::max(p.k_cache.dims, p.v_cache.dims) : 0);
    for (int64_t token = part * tokens / parts; token < (part + 1) * tokens / parts; ++token) {
      const NewToken t = new_token(p, token);
      if (t.sequence < 0) continue;
      for (int64_t i = 0; i < p.rows_per_token(); ++i) {
        const NewRow row = new_row(p, t, i);
        if (row.scale != nullptr) {
          quantise(p, t, row, values.data());
        } else {
          append_row<Numbers, T>(p, t, row, 0, 1);
        }
      }
    }
  });
}

template <class T>
void append_all(const AppendParams& p) {
  switch (p.k_cache.dtype) {
    case DType::float8_e4m3:
      return append_all<T, DType::float8_e4m3>(p);
    case DType::float8_e5m2:
      return append_all<T, DType::float8_e5m2>(p);
    default:
      return append_all<T, DType::int8>(p);
  }
}

}  // namespace

void append_kv(const AppendParams& p) {
  find_bad_numbers(p, 0, 1, refuse);
  Destinations destinations(p);
  for (int64_t token = 0; token < p.all_tokens(); ++token) {
    const NewToken t = new_token(p, token);
    if (t.sequence < 0) continue;
    find_bad_place(p, t, refuse);
    destinations.add(t);
  }
  destinations.check();
  switch (p.dtype) {
    case DType::float32:
      return append_all<float>(p);
    case DType::float16:
      return append_all<torch::headeronly::Half>(p);
    case DType::bfloat16:
      return append_all<torch::headeronly::BFloat16>(p);
    default:
      return append_all<uint8_t>(p);
  }
}

}  // namespace lean::cpu
