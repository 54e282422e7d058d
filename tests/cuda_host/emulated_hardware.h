// csrc/cuda/runtime.h itself, above the recording cuda_runtime.h beside this file. What kernels call is the
// emulated device's, under another name: names of lean::hw that runtime.h has too are then runtime.h's.
#pragma once

#define hw emulated_hw
#include "../emulation/emulated_hardware.h"
#undef hw

namespace lean::hw {
using namespace emulated_hw;
}

#include "cuda/runtime.h"
