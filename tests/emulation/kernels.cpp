// The kernels' own sources, compiled for the emulated device.
#include "cuda/append.cu"
#include "cuda/decode/kernels_bf16.cu"
#include "cuda/decode/kernels_fp16.cu"
#include "cuda/launch.cu"
#include "cuda/merge_states.cu"
