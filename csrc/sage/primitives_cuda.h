// The primitives as PTX, beyond csrc/device. Layouts of fragments: PTX manual, "Warp-level matrix
// instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "device/primitives.h"
#include "feature.h"

namespace video_attn::sage {

// -- threads --------------------------------------------------------------------------------------

VIDEO_ATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
VIDEO_ATTN_DEVICE int64_t block_index_x() { return blockIdx.x; }
VIDEO_ATTN_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
VIDEO_ATTN_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
VIDEO_ATTN_DEVICE int64_t grid_size_x() { return gridDim.x; }

VIDEO_ATTN_DEVICE void block_barrier() { __syncthreads(); }

VIDEO_ATTN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
VIDEO_ATTN_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}

// -- numbers that stay out of registers -----------------------------------------------------------

// x, which the compiler can neither keep from before nor guess.
VIDEO_ATTN_DEVICE uint32_t computed_afresh(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// -- copies from global to shared memory ----------------------------------------------------------

// 16 aligned bytes.
VIDEO_ATTN_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

VIDEO_ATTN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies; others see them after a barrier.
VIDEO_ATTN_DEVICE void copy_async_wait_all() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// -- matrix fragments -----------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l points to row l % 8 of matrix l / 8.
VIDEO_ATTN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

VIDEO_ATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// c += a b; a is 16 x 32 (or 16 x 16 for fp16), b is 32 x 8 (16 x 8).
VIDEO_ATTN_DEVICE void mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

VIDEO_ATTN_DEVICE void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

VIDEO_ATTN_DEVICE void mma_fp16(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%0, %1};"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// FP8 exists from compute capability 8.9 on; the launcher asks no kernel of an older one for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
VIDEO_ATTN_DEVICE void mma_fp8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

VIDEO_ATTN_DEVICE void mma_fp8(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%0, %1};"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four values to FP8 (e4m3fn), nearest, ties to even, clamped; x0 in the lowest byte.
VIDEO_ATTN_DEVICE uint32_t pack_fp8(float x0, float x1, float x2, float x3) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x1), "f"(x0));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x3), "f"(x2));
  return static_cast<uint32_t>(high) << 16 | low;
}
#else
template <class C>
VIDEO_ATTN_DEVICE void mma_fp8(C&, const uint32_t (&)[4], uint32_t, uint32_t) {
  __trap();
}
VIDEO_ATTN_DEVICE uint32_t pack_fp8(float, float, float, float) {
  __trap();
  return 0;
}
#endif

// -- numbers --------------------------------------------------------------------------------------

VIDEO_ATTN_DEVICE float as_float(int32_t bits) { return __int_as_float(bits); }
VIDEO_ATTN_DEVICE float as_float(float x) { return x; }
VIDEO_ATTN_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
VIDEO_ATTN_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }

VIDEO_ATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

VIDEO_ATTN_DEVICE float log2_fast(float x) { return __log2f(x); }
VIDEO_ATTN_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
VIDEO_ATTN_DEVICE float maximum(float a, float b) {
  return fmaxf(a, b);
}  // the other one, if one is NaN
VIDEO_ATTN_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }

// Nearest, ties to even, clamped to -127..127 by the caller's scaling; NaN becomes 0.
VIDEO_ATTN_DEVICE int round_to_int8(float x) {
  int y;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

VIDEO_ATTN_DEVICE uint32_t pack_half2(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

VIDEO_ATTN_DEVICE float low_half(uint32_t pair) {
  return __low2float(*reinterpret_cast<const __half2*>(&pair));
}

VIDEO_ATTN_DEVICE float high_half(uint32_t pair) {
  return __high2float(*reinterpret_cast<const __half2*>(&pair));
}

VIDEO_ATTN_DEVICE float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
VIDEO_ATTN_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
VIDEO_ATTN_DEVICE uint16_t float_to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// -- launches -------------------------------------------------------------------------------------

// Whether this pass of the compiler makes code for an architecture with a feature.
constexpr bool is_built_with(Feature feature) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kWarpgroups = true;
#else
  constexpr bool kWarpgroups = false;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  constexpr bool kFp8 = true;
#else
  constexpr bool kFp8 = false;
#endif
  return feature == Feature::kNone || (feature == Feature::kFp8 ? kFp8 : kWarpgroups);
}

// A kernel is a type: Params, kThreads, kBlocksPerProcessor, kSharedBytes, kNeeds, run(params).
// There is no code of it for architectures without what it needs.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerProcessor)
    entry(const __grid_constant__ typename Kernel::Params params) {
  if constexpr (is_built_with(Kernel::kNeeds)) {
    Kernel::run(params);
  } else {
    __trap();  // the launchers ask first; nothing returns an output that nobody wrote
  }
}

// Has static shared memory only where warpgroup code was built: what a launcher can ask for.
static __global__ void warpgroup_marker() {
  if constexpr (is_built_with(Feature::kWarpgroups)) {
    __shared__ volatile int mark;
    mark = 1;
  }
}

// Devices of which something is known: the driver takes microseconds to say it again.
class Devices {
 public:
  bool has(int device) const { return (bits_.load() & bit(device)) != 0; }
  void add(int device) { bits_ |= bit(device); }

 private:
  static uint64_t bit(int device) { return device < 64 ? uint64_t{1} << device : 0; }
  std::atomic<uint64_t> bits_{0};
};

// Whether a device, which is current, runs code that was built for compute capability 9.0a.
inline bool has_warpgroup_code(int device) {
  static Devices with, without;
  if (with.has(device)) return true;
  if (without.has(device)) return false;
  cudaFuncAttributes marker;
  const bool has =
      cudaFuncGetAttributes(&marker, warpgroup_marker) == cudaSuccess && marker.sharedSizeBytes > 0;
  (has ? with : without).add(device);
  return has;
}

inline bool has_warpgroup_code() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && has_warpgroup_code(device);
}

// Asks, and sets, what the first launch of a kernel on a device needs: null, or why it cannot run.
template <class Kernel>
const char* prepare(int device) {
  // A device runs code made for, or from, an older architecture, which may have no FP8.
  cudaFuncAttributes code;
  cudaError_t error = cudaFuncGetAttributes(&code, entry<Kernel>);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (Kernel::kNeeds == Feature::kFp8 && (code.binaryVersion < 89 || code.ptxVersion < 89)) {
    return "this build has no FP8 code for the device; add 89 or newer to VIDEO_ATTN_CUDA_ARCHS";
  }
  if (Kernel::kNeeds == Feature::kWarpgroups && !has_warpgroup_code(device)) {
    return "this build has no warpgroup code for the device; add 90a to VIDEO_ATTN_CUDA_ARCHS";
  }
  if constexpr (Kernel::kSharedBytes > 48 * 1024) {
    error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Kernel::kSharedBytes);
    if (error == cudaSuccess) {  // so that as many blocks fit as the kernel is made for
      error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

// Null, or why nothing was launched.
template <class Kernel>
const char* launch(const typename Kernel::Params& params, int64_t x, int y, int z, void* stream) {
  static Devices prepared;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (!prepared.has(device)) {
    if (const char* reason = prepare<Kernel>(device)) return reason;
    prepared.add(device);
  }
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
  entry<Kernel>
      <<<grid, Kernel::kThreads, Kernel::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(params);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace video_attn::sage
