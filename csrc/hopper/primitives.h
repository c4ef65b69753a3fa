// What the kernels here are written with, beyond csrc/device and ThunderKittens: boxes of the
// tensor memory accelerator (TMA), what holds registers in place between products, launches. Two
// implementations: PTX, and a host emulation.
#pragma once

#ifdef __CUDACC__
#include "hopper/primitives_cuda.h"
#else
#include "hopper/emulation/primitives.h"
#endif
