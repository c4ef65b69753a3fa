// Of the CUDA language what csrc/hopper uses, for the host emulation: threads are those of
// emulation/block.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulation/machine.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct int4 {
  int x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }

using std::max;
using std::min;

namespace emulated_language {

using namespace video_attn::emulation;

struct ThreadIndex {
  operator unsigned() const { return static_cast<unsigned>(Block::current().thread()); }
};
struct BlockIndex {
  operator unsigned() const { return static_cast<unsigned>(Block::current().index.x); }
};
struct GridSize {
  operator unsigned() const { return static_cast<unsigned>(Block::current().grid.x); }
};
template <class X>
struct Dimensions {
  X x;
};

}  // namespace emulated_language

inline constexpr emulated_language::Dimensions<emulated_language::ThreadIndex> threadIdx{};
inline constexpr emulated_language::Dimensions<emulated_language::BlockIndex> blockIdx{};
inline constexpr emulated_language::Dimensions<emulated_language::GridSize> gridDim{};

inline void __syncthreads() { video_attn::emulation::Block::current().barrier(); }
inline void __syncwarp() { video_attn::emulation::warp_barrier(); }
inline bool __any_sync(unsigned, bool x) { return video_attn::emulation::ballot(x) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __ballot_sync(unsigned, bool x) { return video_attn::emulation::ballot(x); }

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulated_language::shuffle("shfl", x, lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulated_language::shuffle("shfl.xor", x, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = threadIdx.x % 32;
  return emulated_language::shuffle("shfl.up", x, lane < distance ? lane : lane - distance);
}

// A thread is never interrupted in the midst of these, and blocks run one after the other.
inline int atomicAdd(int* at, int x) { return std::exchange(*at, *at + x); }
inline float atomicAdd(float* at, float x) { return std::exchange(*at, *at + x); }
inline int atomicMax(int* at, int x) { return std::exchange(*at, std::max(*at, x)); }
