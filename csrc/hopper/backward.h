// The launches of a backward. Included by the two components.
#pragma once

#include "hopper/backward_arguments.h"
#include "hopper/backward_fused.h"
#include "hopper/launch.h"

namespace video_attn::hopper {

template <typename Globals>
cudaError_t launch(void (*kernel)(Globals), const BackwardParams& params, const Globals& globals,
                   int threads, int shared_bytes, cudaStream_t stream) {
  const int64_t blocks = blocks_of(params, globals);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (shared_bytes > 0) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<uint32_t>(blocks), threads, shared_bytes, stream>>>(globals);
  return cudaGetLastError();
}

template <typename Value>
cudaError_t launch_prepare(const BackwardParams& params, float* statistics, cudaStream_t stream) {
  return launch(prepare_backward<Value>, params, prepare_globals(params, statistics),
                kPrepareThreads, 0, stream);
}

template <typename Config>
cudaError_t launch_walk(const BackwardParams& params, const float* statistics,
                        cudaStream_t stream) {
  BackwardGlobals globals{};
  const cudaError_t status = walk_globals<Config>(params, statistics, nullptr, &globals);
  if (status != cudaSuccess) return status;
  return launch(backward_kernel<Config>, params, globals, Config::kThreads, Config::kSharedBytes,
                stream);
}

template <typename Value>
cudaError_t launch_fused(const BackwardParams& params, const float* statistics, float* dq_sums,
                         cudaStream_t stream) {
  using Config = FusedConfig<Value>;
  BackwardGlobals globals{};
  FinishGlobals finish{};
  cudaError_t status = walk_globals<Config>(params, statistics, dq_sums, &globals);
  if (status == cudaSuccess) status = finish_globals(params, dq_sums, &finish);
  if (status == cudaSuccess) {
    status = cudaMemsetAsync(dq_sums, 0, dq_sums_bytes(params.problem), stream);
  }
  if (status == cudaSuccess) {
    status = launch(fused_backward_kernel<Config>, params, globals, Config::kThreads,
                    Config::kSharedBytes, stream);
  }
  if (status != cudaSuccess) return status;
  return launch(finish_queries<Value>, params, finish, 128, 0, stream);
}

template <typename Value, int kHeadDim, Walk kWalk, bool kCoarse>
cudaError_t launch_walk(const BackwardParams& params, const float* statistics,
                        cudaStream_t stream) {
  const Problem& problem = params.problem;
  if constexpr (kCoarse) {
    if (shares_lists(kWalk == Walk::kKeys ? problem.kv_side : problem.q_side)) {
      return launch_walk<BackwardConfig<Value, kHeadDim, kWalk, true>>(params, statistics, stream);
    }
  }
  return launch_walk<BackwardConfig<Value, kHeadDim, kWalk, false>>(params, statistics, stream);
}

template <typename Value, int kHeadDim, bool kCoarse>
cudaError_t launch_backward(const BackwardParams& params, void* workspace, cudaStream_t stream) {
  float* statistics = static_cast<float*>(workspace);
  cudaError_t status = launch_prepare<Value>(params, statistics, stream);
  if (status != cudaSuccess) return status;
  if constexpr (kCoarse && kHeadDim == 128) {
    if (is_fused(params)) {
      float* dq_sums = statistics + statistics_bytes(params.problem) / sizeof(float);
      return launch_fused<Value>(params, statistics, dq_sums, stream);
    }
  }
  status = launch_walk<Value, kHeadDim, Walk::kKeys, kCoarse>(params, statistics, stream);
  if (status != cudaSuccess) return status;
  return launch_walk<Value, kHeadDim, Walk::kQueries, kCoarse>(params, statistics, stream);
}

// The whole backward, for either grain.
template <bool kCoarse>
cudaError_t launch_backward(const BackwardParams& params, void* workspace, cudaStream_t stream) {
  const bool narrow = params.problem.head_dim <= 64;
  if (params.problem.element == Element::kFloat16) {
    return narrow ? launch_backward<kittens::half, 64, kCoarse>(params, workspace, stream)
                  : launch_backward<kittens::half, 128, kCoarse>(params, workspace, stream);
  }
  return narrow ? launch_backward<kittens::bf16, 64, kCoarse>(params, workspace, stream)
                : launch_backward<kittens::bf16, 128, kCoarse>(params, workspace, stream);
}

}  // namespace video_attn::hopper
