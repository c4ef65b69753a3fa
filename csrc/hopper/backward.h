// The launches of a backward. Included by the two components.
#pragma once

#include "hopper/backward_arguments.h"
#include "hopper/backward_fused.h"
#include "hopper/launch.h"

namespace video_attn::hopper {

constexpr int kSharedBytesByDefault = 48 * 1024;  // a kernel gets more only when asked for

template <typename Globals>
cudaError_t launch(void (*kernel)(Globals), const BackwardParams& params, const Globals& globals,
                   int threads, int shared_bytes, cudaStream_t stream) {
  const int64_t blocks = blocks_of(params, globals);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (shared_bytes > kSharedBytesByDefault) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return launch_blocks(kernel, static_cast<uint32_t>(blocks), threads, shared_bytes, stream,
                       globals);
}

template <typename Value>
cudaError_t launch_prepare(const BackwardParams& params, const BackwardBuffers& buffers,
                           cudaStream_t stream) {
  return launch(prepare_backward<Value>, params, prepare_globals(params, buffers.statistics),
                kPrepareThreads, 0, stream);
}

// A walk by `kernel`, after the order of its lists.
template <typename Config>
cudaError_t launch_walk(void (*kernel)(BackwardGlobals), const BackwardParams& params,
                        const BackwardBuffers& buffers, cudaStream_t stream) {
  BackwardGlobals globals{};
  cudaError_t status = walk_globals<Config>(params, buffers, &globals);
  if (status == cudaSuccess && globals.order != nullptr) {
    status = launch(order_lists, params, order_globals<Config>(params, buffers), kOrderThreads,
                    kOrderThreads * sizeof(int32_t), stream);
  }
  if (status != cudaSuccess) return status;
  return launch(kernel, params, globals, Config::kThreads, Config::kSharedBytes, stream);
}

template <typename Value, int kHeadDim, Walk kWalk, bool kCoarse>
cudaError_t launch_walk(const BackwardParams& params, const BackwardBuffers& buffers,
                        cudaStream_t stream) {
  const Problem& problem = params.problem;
  if constexpr (kCoarse) {
    if (shares_lists(kWalk == Walk::kKeys ? problem.kv_side : problem.q_side)) {
      using Config = BackwardConfig<Value, kHeadDim, kWalk, true>;
      return launch_walk<Config>(backward_kernel<Config>, params, buffers, stream);
    }
  }
  using Config = BackwardConfig<Value, kHeadDim, kWalk, false>;
  return launch_walk<Config>(backward_kernel<Config>, params, buffers, stream);
}

template <typename Value>
cudaError_t launch_fused(const BackwardParams& params, const BackwardBuffers& buffers,
                         size_t dq_sums_bytes, cudaStream_t stream) {
  using Config = FusedConfig<Value>;
  FinishGlobals finish{};
  cudaError_t status = finish_globals(params, buffers.dq_sums, &finish);
  if (status == cudaSuccess) {
    status = cudaMemsetAsync(buffers.dq_sums, 0, dq_sums_bytes, stream);
  }
  if (status == cudaSuccess) {
    status = launch_walk<Config>(fused_backward_kernel<Config>, params, buffers, stream);
  }
  if (status != cudaSuccess) return status;
  return launch(finish_queries<Value>, params, finish, 128, kFinishSharedBytes, stream);
}

template <typename Value, int kHeadDim, bool kCoarse>
cudaError_t launch_backward(const BackwardParams& params, void* base, cudaStream_t stream) {
  const bool fused = kCoarse && is_fused(params);
  const BackwardWorkspace workspace = lay_out_workspace(params, fused);
  const BackwardBuffers buffers(base, workspace);
  cudaError_t status = launch_prepare<Value>(params, buffers, stream);
  if (status != cudaSuccess) return status;
  if constexpr (kCoarse && kHeadDim == 128) {
    if (fused) {
      return launch_fused<Value>(params, buffers, workspace.bytes - workspace.dq_sums, stream);
    }
  }
  status = launch_walk<Value, kHeadDim, Walk::kKeys, kCoarse>(params, buffers, stream);
  if (status != cudaSuccess) return status;
  return launch_walk<Value, kHeadDim, Walk::kQueries, kCoarse>(params, buffers, stream);
}

inline bool is_legal(const Problem& problem) {
  return problem.head_dim > 0 && problem.head_dim <= 128 && problem.head_dim % 8 == 0 &&
         problem.q_side.block_size % kUnit == 0 && problem.kv_side.block_size % kUnit == 0;
}

// The whole backward, for either grain.
template <bool kCoarse>
cudaError_t launch_backward(const BackwardParams& params, void* workspace, cudaStream_t stream) {
  if (!is_legal(params.problem)) return cudaErrorInvalidValue;
  const bool narrow = params.problem.head_dim <= 64;
  if (params.problem.element == Element::kFloat16) {
    return narrow ? launch_backward<kittens::half, 64, kCoarse>(params, workspace, stream)
                  : launch_backward<kittens::half, 128, kCoarse>(params, workspace, stream);
  }
  return narrow ? launch_backward<kittens::bf16, 64, kCoarse>(params, workspace, stream)
                : launch_backward<kittens::bf16, 128, kCoarse>(params, workspace, stream);
}

}  // namespace video_attn::hopper
