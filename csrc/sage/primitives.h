// What the kernels are written with, beyond csrc/device. Two implementations: PTX, and a host
// emulation that runs a thread block on the CPU, warps in lockstep, with the lane layouts that the
// PTX manual documents.
#pragma once

#ifdef __CUDACC__
#include "primitives_cuda.h"
#else
#include "emulation/primitives_emulated.h"
#endif
