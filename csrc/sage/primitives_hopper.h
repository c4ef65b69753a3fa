// What the warpgroup kernel is written with, beyond primitives.h; again PTX and a host emulation.
#pragma once

#ifdef __CUDACC__
#include "primitives_hopper_cuda.h"
#else
#include "emulation/primitives_hopper_emulated.h"
#endif
