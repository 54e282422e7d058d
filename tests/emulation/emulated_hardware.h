// The twin of csrc/cuda/{ptx,words,host}.h on the emulated device; those document the functions.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"
#include "params.h"

#define LEAN_DEVICE inline
#define LEAN_COLD static inline
#define LEAN_KERNEL(threads, min_ctas) void
#define LEAN_KERNEL_PARAMETER const
#define LEAN_DEVICE_VARIABLE

namespace lean::hw {

using emulation::Collective;
using emulation::Device;

using Half = c10::Half;
using BFloat16 = c10::BFloat16;
struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

constexpr int kWarpThreads = emulation::kWarpLanes;

inline int thread_index() {
  return Device::get().thread();
}
inline int thread_index_again() {
  return thread_index();
}
inline int64_t cta_index() {
  return Device::get().cta_index();
}
inline int64_t num_ctas() {
  return Device::get().num_ctas();
}
inline char* shared_memory() {
  return Device::get().shared_memory();
}
inline void sync_block() {
  Device::get().sync_block();
}
inline void sync_warp() {
  Device::get().collective(Collective::sync_warp, nullptr);
}
inline float shuffle_xor(float value, int mask) {
  emulation::FloatExchange exchange{value, mask};
  Device::get().collective(Collective::shuffle_xor, &exchange);
  return exchange.value;
}
inline int32_t shuffle_up(int32_t value, int lanes) {
  emulation::IntExchange exchange{value, lanes};
  Device::get().collective(Collective::shuffle_up, &exchange);
  return static_cast<int32_t>(exchange.value);
}
template <class V>
V shuffle(V value, int lane) {
  emulation::IntExchange exchange{0, lane};
  std::memcpy(&exchange.value, &value, sizeof value);
  Device::get().collective(Collective::shuffle, &exchange);
  std::memcpy(&value, &exchange.value, sizeof value);
  return value;
}
inline bool any(bool value) {
  Device::get().collective(Collective::any, &value);
  return value;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  Device::get().copy_async(shared, valid ? global : nullptr, 16);
}
inline void copy_word_async(void* shared, const void* global) {
  Device::get().copy_async(shared, global, 4);
}
inline void commit_copies() {
  Device::get().commit_copies();
}
template <int kPending>
inline void wait_copies() {
  Device::get().wait_copies(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  Device::get().check_aligned(row, 16);
  emulation::MatrixLoad load{r, {}};
  std::memcpy(load.row, row, sizeof load.row);
  Device::get().collective(Collective::load_matrices, &load);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  Device::get().check_aligned(row, 16);
  emulation::MatrixLoad load{r, {}};
  std::memcpy(load.row, row, sizeof load.row);
  Device::get().collective(Collective::load_transposed, &load);
}
template <class T>
inline float bits_to_float(uint16_t bits) {
  return static_cast<float>(T(bits, T::from_bits()));
}
template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MatrixProduct product{c, a, {b0, b1}, &bits_to_float<T>};
  Device::get().collective(Collective::multiply_add, &product);
}
template <class T>
inline uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(T(low).x) | static_cast<uint32_t>(T(high).x) << 16;
}

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

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selectors >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
template <class T>
inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  const auto low = [](uint32_t x) { return bits_to_float<T>(static_cast<uint16_t>(x)); };
  return pack<T>(low(a) - low(b), low(a >> 16) - low(b >> 16));
}
inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const auto low = [](uint32_t x) { return bits_to_float<Half>(static_cast<uint16_t>(x)); };
  return pack<Half>(low(a) * low(b), low(a >> 16) * low(b >> 16));
}
inline uint32_t fp16_to_bf16(uint32_t pair) {
  return pack<BFloat16>(bits_to_float<Half>(static_cast<uint16_t>(pair)),
                        bits_to_float<Half>(static_cast<uint16_t>(pair >> 16)));
}
constexpr bool kConvertsE4m3 = true;
inline void e4m3_to_fp16(uint32_t word, uint32_t& low, uint32_t& high) {
  const auto value = [&](int byte) -> float {
    return c10::Float8_e4m3fn(static_cast<uint8_t>(word >> 8 * byte), c10::Float8_e4m3fn::from_bits());
  };
  low = pack<Half>(value(0), value(1));
  high = pack<Half>(value(2), value(3));
}
inline float exp2_fast(float x) {
  return exp2f(x);
}
template <class V>
inline V load_vector(const V* from) {
  Device::get().check_aligned(from, sizeof(V));
  return *from;
}
template <class V>
inline void store_vector(V* to, V value) {
  Device::get().check_aligned(to, sizeof(V));
  *to = value;
}
inline const float* address_of_one() {
  static const float one = 1.0f;
  return &one;
}

inline uint64_t load_relaxed(uint64_t* word) {
  return Device::get().load(word);
}
inline void fence_acquire() {
  Device::get().fence_acquire();
}
inline void store_relaxed(uint64_t* word, uint64_t value) {
  Device::get().store(word, value, false);
}
inline void store_release(uint64_t* word, uint64_t value) {
  Device::get().store(word, value, true);
}
inline uint64_t fetch_add_relaxed(uint64_t* word, uint64_t value) {
  return Device::get().fetch_add(word, value);
}
inline void compare_exchange_relaxed(uint64_t* word, uint64_t expected, uint64_t desired) {
  Device::get().compare_exchange(word, expected, desired);
}
inline void pause(unsigned) {
  Device::get().pause();
}

template <class V>
inline V load_shared_between_ctas(const V* from) {
  Device::get().check_aligned(from, sizeof(V));
  Device::get().watch_load(from, sizeof(V));
  return *from;
}
template <class V>
inline void store_shared_between_ctas(V* to, V value) {
  Device::get().check_aligned(to, sizeof(V));
  Device::get().watch_store(to, sizeof(V));
  *to = value;
}

struct DeviceFacts {
  int sms;
  int capability;
};
inline DeviceFacts device_facts(int) {
  return {Device::get().options().sms, Device::get().options().capability};
}
template <class Arguments>
int ctas_per_sm(void (*)(Arguments), int, int) {
  return Device::get().options().ctas_per_sm;
}
template <class V>
V* device_address(V& variable) {
  return &variable;
}
template <class V>
V take_value(V* variable) {
  const V value = *variable;
  *variable = V{};
  return value;
}
template <class Arguments>
void launch(void (*kernel)(Arguments), Arguments arguments, int64_t ctas, int threads, int shared_bytes,
            void*) {
  Device::get().launch([=] { kernel(arguments); }, ctas, threads, shared_bytes);
}
template <class Allocate>
void* allocate_workspace(const Allocate&, int64_t bytes) {
  return Device::get().allocate_workspace(bytes);
}

}  // namespace lean::hw
