// The CUDA runtime, as launches use it: runtime.h, or its twin on the emulated device.
#pragma once

#if !defined(__CUDACC__)
#include "emulated_hardware.h"
#else
#include "cuda/runtime.h"
#endif
