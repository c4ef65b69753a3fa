// Host side of the backward: workspace, tensor maps, launches. Included by the two components.
#pragma once

#include "hopper/backward_kernel.h"
#include "hopper/backward_prepare.h"
#include "hopper/launch.h"
#include "hopper/tensor_map.h"

namespace video_attn::hopper {

inline size_t statistics_bytes(const Problem& problem) {
  return static_cast<size_t>(problem.batch) * problem.heads * units_of(problem.q_side.length) *
         (2 * kUnit * sizeof(float));
}

inline bool shares_lists(const Side& side) { return side.block_size % (2 * kUnit) == 0; }

template <typename Value>
cudaError_t launch_prepare(const BackwardParams& params, float* statistics, cudaStream_t stream) {
  const Problem& problem = params.problem;
  PrepareGlobals globals{};
  globals.out = params.out;
  globals.grad_out = params.grad_out;
  globals.lse = params.lse;
  globals.grad_lse = params.grad_lse;
  globals.statistics = statistics;
  globals.q_side = problem.q_side;
  globals.heads = problem.heads;
  globals.head_dim = problem.head_dim;
  globals.units = units_of(problem.q_side.length);
  const int64_t blocks = static_cast<int64_t>(globals.units) * problem.heads * problem.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  prepare_backward<Value><<<static_cast<uint32_t>(blocks), kPrepareThreads, 0, stream>>>(globals);
  return cudaGetLastError();
}

template <typename Config>
cudaError_t launch_walk(const BackwardParams& params, const float* statistics,
                        cudaStream_t stream) {
  constexpr bool kKeys = Config::kWalk == Walk::kKeys;
  const Problem& problem = params.problem;
  const Extents q_extents{problem.batch, problem.heads, problem.q_side.length, problem.head_dim};
  const Extents kv_extents{problem.batch, problem.kv_heads, problem.kv_side.length,
                           problem.head_dim};
  const Extents& kept_extents = kKeys ? kv_extents : q_extents;
  const Extents& streamed_extents = kKeys ? q_extents : kv_extents;

  BackwardGlobals globals{};
  cudaError_t status = cudaSuccess;
  const auto map = [&](CUtensorMap* target, const Tensor4& tensor, const Extents& extents) {
    if (status != cudaSuccess) return;
    status = make_tensor_map(target, tensor, extents, problem.element, kUnit);
  };
  map(&globals.kept_first, kKeys ? params.k : params.q, kept_extents);
  map(&globals.kept_second, kKeys ? params.v : params.grad_out, kept_extents);
  map(&globals.streamed_first, kKeys ? params.q : params.k, streamed_extents);
  map(&globals.streamed_second, kKeys ? params.grad_out : params.v, streamed_extents);
  map(&globals.result_first, kKeys ? params.dk : params.dq, kept_extents);
  if (kKeys) map(&globals.result_second, params.dv, kept_extents);
  if (status != cudaSuccess) return status;

  globals.statistics = statistics;
  globals.lists = kKeys ? params.transposed : params.lists;
  globals.kept = kKeys ? problem.kv_side : problem.q_side;
  globals.streamed = kKeys ? problem.q_side : problem.kv_side;
  globals.group = problem.heads / problem.kv_heads;
  globals.list_heads = kKeys ? globals.group : 1;
  globals.heads = problem.heads;
  globals.kept_heads = kKeys ? problem.kv_heads : problem.heads;
  globals.tiles = (units_of(globals.kept.length) + Config::kWarpgroups - 1) / Config::kWarpgroups;
  globals.scale = problem.scale;
  globals.scale_log2 = problem.scale * 1.4426950408889634f;

  const int64_t blocks = static_cast<int64_t>(globals.tiles) * globals.kept_heads * problem.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  status = cudaFuncSetAttribute(backward_kernel<Config>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (status != cudaSuccess) return status;
  backward_kernel<Config>
      <<<static_cast<uint32_t>(blocks), Config::kThreads, Config::kSharedBytes, stream>>>(globals);
  return cudaGetLastError();
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
  status = launch_walk<Value, kHeadDim, Walk::kKeys, kCoarse>(params, statistics, stream);
  if (status != cudaSuccess) return status;
  return launch_walk<Value, kHeadDim, Walk::kQueries, kCoarse>(params, statistics, stream);
}

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
