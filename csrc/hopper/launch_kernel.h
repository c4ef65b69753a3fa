// One launch of a kernel, for both directions.
#pragma once

#include <atomic>

#include "hopper/primitives.h"

namespace video_attn::hopper {

// Lets a kernel have `bytes` of shared memory, once on each device.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  constexpr int kByDefault = 48 * 1024, kCounted = 64;
  if (bytes <= kByDefault) return cudaSuccess;
  static std::atomic<uint64_t> allowed{0};  // bit d: on device d
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = device < kCounted ? uint64_t{1} << device : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

template <auto kKernel, class... Arguments>
cudaError_t launch(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const cudaError_t status = allow_shared_memory<kKernel>(shared_bytes);
  if (status != cudaSuccess) return status;
  return launch_blocks(kKernel, static_cast<uint32_t>(blocks), threads, shared_bytes, stream,
                       arguments...);
}

}  // namespace video_attn::hopper
