// The hardware below plain arithmetic, one function per instruction or intrinsic.
//
// This file, words.h and host.h are all that kernels and launches know of it. Compiled by nvcc they are
// intrinsics and PTX. Compiled by a host compiler, tests/emulation puts a twin of them on the include path
// that runs each CUDA thread as a fiber, so that the kernels' logic is tested where there is no GPU.
#pragma once

#if !defined(__CUDACC__)

#include "emulated_hardware.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdint>
#include <type_traits>

#include "params.h"

#define LEAN_DEVICE __device__ __forceinline__
// What is rarely called, and kept out of the way of the rest: it would take registers and instruction cache.
#define LEAN_COLD static __device__ __noinline__
#define LEAN_KERNEL(threads, min_ctas) __global__ void __launch_bounds__(threads, min_ctas)
#define LEAN_KERNEL_PARAMETER const __grid_constant__
#define LEAN_DEVICE_VARIABLE __device__

namespace lean::hw {

using Half = __half;
using BFloat16 = __nv_bfloat16;
using Float2 = float2;
using Float4 = float4;
using Words4 = uint4;

constexpr int kWarpThreads = 32;

LEAN_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
// The same, read anew. What follows from it is computed where it is used, and is in no register before.
LEAN_DEVICE int thread_index_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
LEAN_DEVICE int64_t cta_index() {
  return blockIdx.x;
}
LEAN_DEVICE int64_t num_ctas() {
  return gridDim.x;
}
LEAN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

LEAN_DEVICE void sync_block() {
  __syncthreads();
}
LEAN_DEVICE void sync_warp() {
  __syncwarp();
}

// Collectives of a whole warp.
LEAN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
LEAN_DEVICE int32_t shuffle_up(int32_t value, int lanes) {
  return __shfl_up_sync(0xffffffffu, value, lanes);
}
// The value of lane `lane`, which may differ from lane to lane.
template <class V>
LEAN_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
LEAN_DEVICE bool any(bool value) {
  return __any_sync(0xffffffffu, value);
}

// Copies 16 bytes to shared memory, or writes 16 zero bytes there and reads nothing. They arrive when the
// thread that asked has waited for them; other threads see them after a barrier with it.
LEAN_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile(
      "{.reg .pred ignored; setp.eq.u32 ignored, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, ignored;}"
      :
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(__cvta_generic_to_global(global)),
        "r"(static_cast<uint32_t>(valid))
      : "memory");
}
// The same of 4 bytes.
LEAN_DEVICE void copy_word_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 4);
}
// Closes the group of the copies since the last call (of this thread).
LEAN_DEVICE void commit_copies() {
  __pipeline_commit();
}
// Waits for all groups but the last `kPending`.
template <int kPending>
LEAN_DEVICE void wait_copies() {
  __pipeline_wait_prior(kPending);
}

// Four 8 x 8 matrices of 16-bit elements from shared memory (PTX ldmatrix.x4): lane i passes the address of
// row i % 8 of matrix i / 8; lane 4 g + t receives elements (g, 2t) and (g, 2t + 1) of matrix j in r[j], or
// of the matrices' transposes.
LEAN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
LEAN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c += a b for a 16 x 16, b 16 x 8, c 16 x 8 (PTX mma.m16n8k16, fp32 accumulation). Lane 4 g + t holds
//   a[0]: (g, 2t..2t+1)  a[1]: (g + 8, 2t..)  a[2]: (g, 2t + 8..)  a[3]: (g + 8, 2t + 8..)
//   b0: (2t..2t+1, g)    b1: (2t + 8.., g)
//   c[0..1]: (g, 2t..2t+1)  c[2..3]: (g + 8, 2t..2t+1)
template <class T>
LEAN_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
LEAN_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
LEAN_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to T, the first in the low half.
template <class T>
LEAN_DEVICE uint32_t pack(float low, float high);
template <>
LEAN_DEVICE uint32_t pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
LEAN_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

struct Numbers {
  static LEAN_DEVICE float to_float(float x) { return x; }
  static LEAN_DEVICE float to_float(Half x) { return __half2float(x); }
  static LEAN_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
  template <class T>
  static LEAN_DEVICE T from_float(float x) {
    if constexpr (std::is_same_v<T, Half>) return __float2half_rn(x);
    if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(x);
    if constexpr (std::is_same_v<T, float>) return x;
  }
  // Rounded to the nearest float; a product by itself, which the compiler fuses with no addition.
  static LEAN_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
  static LEAN_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
};

// Bytes of two words by the selectors' nibbles: 0 to 3 are those of a, 4 to 7 those of b.
LEAN_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  return __byte_perm(a, b, selectors);
}
// Differences of two pairs of T.
template <class T>
LEAN_DEVICE uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <>
LEAN_DEVICE uint32_t subtract_pairs<Half>(uint32_t a, uint32_t b) {
  const __half2 difference =
      __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}
template <>
LEAN_DEVICE uint32_t subtract_pairs<BFloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 difference =
      __hsub2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}
// Products of two pairs of fp16 numbers.
LEAN_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const __half2 product = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}
// A pair of fp16 numbers that bf16 holds exactly, as that.
LEAN_DEVICE uint32_t fp16_to_bf16(uint32_t pair) {
  const float2 floats = __half22float2(reinterpret_cast<const __half2&>(pair));
  return pack<BFloat16>(floats.x, floats.y);
}
// The four e4m3 numbers of a word as two pairs of fp16 ones, where the chip has an instruction for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr bool kConvertsE4m3 = false;
#else
constexpr bool kConvertsE4m3 = true;
#endif
LEAN_DEVICE void e4m3_to_fp16(uint32_t word, uint32_t& low, uint32_t& high) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
      : "=r"(low), "=r"(high)
      : "r"(word));
}

// 2^x, subnormal results as 0.
LEAN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Vectors, at addresses that are multiples of their size.
template <class V>
LEAN_DEVICE V load_vector(const V* from) {
  return *from;
}
template <class V>
LEAN_DEVICE void store_vector(V* to, V value) {
  *to = value;
}

static __device__ const float one = 1.0f;
LEAN_DEVICE const float* address_of_one() {
  return &one;
}

}  // namespace lean::hw

#endif
