// What the tile kernels' source files share: the element types, the target pragmas, and the list of kernels.
// Standard headers come first, so that none is compiled for more than the baseline.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/kernels/tile_kernel.h"

#if defined(__x86_64__) && !defined(LEAN_PORTABLE_ONLY)
#define LEAN_X86
#endif

// Compiles the rest of a source file for a target of its own; whether it runs is decided at run
// time. GCC instantiates templates at the end of the file, so the target must still hold there and
// is not popped.
#define LEAN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define LEAN_TARGET_BEGIN(features) \
  LEAN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LEAN_TARGET_END LEAN_PRAGMA(clang attribute pop)
#else
#define LEAN_TARGET_BEGIN(features) LEAN_PRAGMA(GCC target(features))
#define LEAN_TARGET_END
#endif

#define LEAN_INLINE __attribute__((always_inline))
#define LEAN_BACKEND_INLINE LEAN_INLINE inline

namespace lean::cpu {

// 16-bit storage; all arithmetic is in fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr DType dtype_of_element(float) {
  return DType::float32;
}
constexpr DType dtype_of_element(Half) {
  return DType::float16;
}
constexpr DType dtype_of_element(BFloat16) {
  return DType::bfloat16;
}

#if defined(LEAN_X86)
namespace amx {
bool may_use_tiles();
extern const TileKernel float16, bfloat16, float16_over_int8, bfloat16_over_int8;
}  // namespace amx
namespace avx512_bf16 {
extern const TileKernel bfloat16, bfloat16_over_fp8, bfloat16_over_int8, float16_over_fp8;
}
namespace avx512 {
extern const TileKernel float32, float16, bfloat16, float32_over_int8, float16_over_int8, bfloat16_over_int8;
extern const TileKernel float32_many_rows, float16_many_rows, bfloat16_many_rows;
}  // namespace avx512
namespace avx2 {
extern const TileKernel float32, float16, bfloat16, float32_over_int8, float16_over_int8, bfloat16_over_int8;
extern const TileKernel float32_many_rows, float16_many_rows, bfloat16_many_rows;
}  // namespace avx2
#endif
namespace portable {
extern const TileKernel float32, float16, bfloat16;
}

}  // namespace lean::cpu
