// Chooses a tile kernel: the best that this machine can run, or the one that LEAN_ATTENTION_CPU names.
#include "cpu/kernels/registry.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/tuning.h"

namespace lean::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool (*runnable)();
  // The kernels by DType; null where a set has nothing to add to the next.
  const TileKernel* kernels[3];
  // Those for many rows, of the same dtypes: in their place from their min_rows on.
  const TileKernel* of_many_rows[3] = {};
  // The kernels that take quantised rows as they are, by q's DType.
  const TileKernel* over_fp8[3] = {};
  const TileKernel* over_int8[3] = {};
  // Its products are dot products of bf16: see Tuning::multiplies_in_fp32.
  bool has_dot_products = false;

  const TileKernel* kernel(DType dtype, DType cache_dtype, int64_t rows) const {
    const int i = static_cast<int>(dtype);
    const bool many = of_many_rows[i] != nullptr && rows >= of_many_rows[i]->min_rows;
    const TileKernel* const kernel = many ? of_many_rows[i] : kernels[i];
    if (cache_dtype == dtype) return kernel;
    const TileKernel* as_is = cache_dtype == DType::int8 ? over_int8[i] : over_fp8[i];
    if (as_is != nullptr) return as_is;
    return kernel != nullptr && kernel->dequantise != nullptr ? kernel : nullptr;
  }
};

#if defined(LEAN_X86)
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi");
}
#endif

// The best set comes first.
const InstructionSet kInstructionSets[] = {
#if defined(LEAN_X86)
    {"amx",
     [] {
       static const bool runnable = has_avx512_bf16() && amx::may_use_tiles();
       return runnable;
     },
     {nullptr, &amx::float16, &amx::bfloat16},
     {},
     {},
     {nullptr, &amx::float16_over_int8, &amx::bfloat16_over_int8}},
    {"avx512_bf16",
     has_avx512_bf16,
     {nullptr, nullptr, &avx512_bf16::bfloat16},
     {},
     {nullptr, &avx512_bf16::float16_over_fp8, &avx512_bf16::bfloat16_over_fp8},
     {nullptr, nullptr, &avx512_bf16::bfloat16_over_int8},
     true},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
     },
     {&avx512::float32, &avx512::float16, &avx512::bfloat16},
     {&avx512::float32_many_rows, &avx512::float16_many_rows, &avx512::bfloat16_many_rows},
     {},
     {&avx512::float32_over_int8, &avx512::float16_over_int8, &avx512::bfloat16_over_int8}},
    {"avx2",
     [] {
       // Every processor with AVX2 and FMA has F16C.
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     },
     {&avx2::float32, &avx2::float16, &avx2::bfloat16},
     {&avx2::float32_many_rows, &avx2::float16_many_rows, &avx2::bfloat16_many_rows},
     {},
     {&avx2::float32_over_int8, &avx2::float16_over_int8, &avx2::bfloat16_over_int8}},
#endif
    {"portable", [] { return true; }, {&portable::float32, &portable::float16, &portable::bfloat16}},
};

// Where Tuning::multiplies_in_fp32 holds, dot products of bf16 are the faster way for fp8 only, whose
// conversion to bf16 is cheaper than to fp32; fp16 queries have twice as many of them.
bool dot_products_pay_off(DType dtype, DType cache_dtype, int64_t rows) {
  const bool fp8 = cache_dtype == DType::float8_e4m3 || cache_dtype == DType::float8_e5m2;
  return fp8 && (dtype == DType::bfloat16 || rows <= 2);
}

}  // namespace

std::string runnable_instruction_sets() {
  std::string names;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runnable()) names += (names.empty() ? "" : " ") + std::string(set.name);
  }
  return names;
}

const TileKernel& tile_kernel(DType dtype, DType cache_dtype, int64_t rows, const std::string& at_most) {
  bool allowed = at_most.empty();
  for (const InstructionSet& set : kInstructionSets) {
    if (at_most == set.name) {
      if (!set.runnable()) {
        throw std::invalid_argument("LEAN_ATTENTION_CPU: this machine cannot run " + at_most +
                                    " (it can run: " + runnable_instruction_sets() + ")");
      }
      allowed = true;
    }
    if (at_most.empty() && set.has_dot_products && tuning().multiplies_in_fp32 &&
        !dot_products_pay_off(dtype, cache_dtype, rows)) {
      continue;
    }
    const TileKernel* kernel = set.kernel(dtype, cache_dtype, rows);
    if (allowed && kernel != nullptr && rows >= kernel->min_rows && set.runnable()) return *kernel;
  }
  throw std::invalid_argument("LEAN_ATTENTION_CPU: unknown instruction set " + at_most +
                              " (this machine can run: " + runnable_instruction_sets() + ")");
}

const TileKernel& tile_kernel(DType dtype, DType cache_dtype, int64_t rows) {
  const char* forced = std::getenv("LEAN_ATTENTION_CPU");
  return tile_kernel(dtype, cache_dtype, rows, forced == nullptr ? "" : forced);
}

}  // namespace lean::cpu
