// What kernels of compute capability 9.0a are written with: barriers in shared memory, bulk copies,
// and the order of products by warpgroups. Two implementations: PTX, and a host emulation that runs
// a thread block on the CPU.
#pragma once

#ifdef __CUDACC__
#include "device/primitives_cuda.h"
#else
#include "emulation/primitives.h"
#endif
