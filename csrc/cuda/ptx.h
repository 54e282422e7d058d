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
#define LEAN_KERNEL(threads, min_ctas) __global__ void __launch_bounds__(threads, min_ctas)
#define LEAN_KERNEL_PARAMETER const __grid_constant__
#define LEAN_DEVICE_VARIABLE __device__

namespace lean::hw {

using Half = __half;
using BFloat16 = __nv_bfloat16;
using Float4 = float4;

constexpr int kWarpThreads = 32;

LEAN_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
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
LEAN_DEVICE int64_t shuffle_up(int64_t value, int lanes) {
  return __shfl_up_sync(0xffffffffu, static_cast<long long>(value), lanes);
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
// thread that asked has waited for them; other threads see them after a barrier with it. (All or nothing: a
// count of bytes known only at run time compiles to a branch for each.)
LEAN_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  __pipeline_memcpy_async(shared, global, 16, valid ? 0 : 16);
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

// Two elements of a quantised cache, the first in the low byte, as two of T. Exact: bf16 and fp16 hold all.
template <class T>
LEAN_DEVICE uint32_t dequantise(DType from, uint32_t pair) {
  if (from == DType::int8) {
    return pack<T>(static_cast<float>(static_cast<int8_t>(pair & 0xff)),
                   static_cast<float>(static_cast<int8_t>(pair >> 8 & 0xff)));
  }
  const uint32_t halves = (pair & 0xff) | (pair & 0xff00) << 8;  // a byte in each half
  uint32_t fp16;
  if (from == DType::float8_e5m2) {
    fp16 = halves << 8;  // it is the upper byte of fp16
  } else {
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(fp16) : "h"(static_cast<uint16_t>(pair)));
#else
    // Sign, exponent and mantissa in their places, and the exponent's bias made up for by 2^8; all ones are
    // NaN.
    const uint32_t magnitude = halves & 0x007f007f, bits = (halves & 0x00800080) << 8 | magnitude << 7;
    const __half2 scaled =
        __hmul2(reinterpret_cast<const __half2&>(bits), __half2half2(__ushort_as_half(0x5c00)));
    fp16 = reinterpret_cast<const uint32_t&>(scaled) | (__vcmpeq2(magnitude, 0x007f007f) & 0x7e007e00);
#endif
  }
  if constexpr (std::is_same_v<T, Half>) return fp16;
  const float2 floats = __half22float2(reinterpret_cast<const __half2&>(fp16));
  return pack<T>(floats.x, floats.y);
}

}  // namespace lean::hw

#endif
