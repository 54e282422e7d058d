// A kernel for each function of ptx.h and words.h that holds PTX. Arguments and results are parameters and
// elements of `out`, so that test_cuda_code.py knows the operands of instructions by where they come from and
// go to.
#include "cuda/decode/kv_format.h"
#include "cuda/words.h"

namespace lean::hw {

__device__ void store(uint32_t* out, const uint32_t (&words)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = words[i];
}

extern "C" {

__global__ void run_load_matrices(uint32_t* out) {
  uint32_t r[4];
  load_matrices(r, shared_memory() + 48);
  store(out, r);
}
__global__ void run_load_matrices_transposed(uint32_t* out) {
  uint32_t r[4];
  load_matrices_transposed(r, shared_memory() + 48);
  store(out, r);
}

#define LEAN_RUN_MULTIPLY_ADD(T)                                                                          \
  __global__ void run_multiply_add_##T(float* out, float c0, float c1, float c2, float c3, uint32_t a0,   \
                                       uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { \
    float c[4] = {c0, c1, c2, c3};                                                                        \
    multiply_add<T>(c, {a0, a1, a2, a3}, b0, b1);                                                         \
    for (int i = 0; i < 4; ++i) out[i] = c[i];                                                            \
  }
LEAN_RUN_MULTIPLY_ADD(Half)
LEAN_RUN_MULTIPLY_ADD(BFloat16)

__global__ void run_pack_Half(uint32_t* out, float low, float high) {
  *out = pack<Half>(low, high);
}
__global__ void run_pack_BFloat16(uint32_t* out, float low, float high) {
  *out = pack<BFloat16>(low, high);
}
__global__ void run_copy_async(const char* global, bool valid) {
  copy_async(shared_memory() + 48, global, valid);
}
__global__ void run_dequantise_e4m3(uint32_t* out, uint32_t word) {
  cuda::dequantise<Half, DType::float8_e4m3>(word, out[0], out[1]);
}
__global__ void run_exp2_fast(float* out, float x) {
  *out = exp2_fast(x);
}

__global__ void run_load_relaxed(uint64_t* out, const uint64_t* word) {
  *out = load_relaxed(word);
}
__global__ void run_fence_acquire() {
  fence_acquire();
}
__global__ void run_store_relaxed(uint64_t* word, uint64_t value) {
  store_relaxed(word, value);
}
__global__ void run_store_release(uint64_t* word, uint64_t value) {
  store_release(word, value);
}
__global__ void run_fetch_add_relaxed(uint64_t* out, uint64_t* word, uint64_t value) {
  *out = fetch_add_relaxed(word, value);
}
__global__ void run_compare_exchange_relaxed(uint64_t* word, uint64_t expected, uint64_t desired) {
  compare_exchange_relaxed(word, expected, desired);
}

}  // extern "C"

}  // namespace lean::hw
