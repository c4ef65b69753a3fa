// The launches of a backward. Included by the two components.
#pragma once

#include "hopper/backward_arguments.h"
#include "hopper/backward_fused.h"
#include "hopper/launch.h"
#include "hopper/launch_kernel.h"

namespace video_attn::hopper {

// A walk by `kKernel`, after the order of its lists.
template <typename Config, auto kKernel>
cudaError_t launch_walk(const BackwardParams& params, const BackwardBuffers& buffers,
                        cudaStream_t stream) {
  BackwardGlobals globals{};
  cudaError_t status = walk_globals<Config>(params, buffers, &globals);
  if (status == cudaSuccess && globals.order != nullptr) {
    const OrderGlobals order = order_globals<Config>(params, buffers);
    status = launch<order_lists>(static_cast<int64_t>(order.heads) * order.batches, kSortThreads,
                                 sizeof(SortMemory), stream, order);
  }
  if (status != cudaSuccess) return status;
  const int64_t blocks =
      static_cast<int64_t>(globals.tiles) * globals.kept_heads * params.problem.batch;
  return launch<kKernel>(blocks, Config::kThreads, Config::kSharedBytes, stream, globals);
}

template <typename Value, int kHeadDim, Walk kWalk, bool kCoarse>
cudaError_t launch_walk(const BackwardParams& params, const BackwardBuffers& buffers,
                        cudaStream_t stream) {
  const Problem& problem = params.problem;
  if constexpr (kCoarse) {
    if (shares_lists(kWalk == Walk::kKeys ? problem.kv_side : problem.q_side)) {
      using Config = BackwardConfig<Value, kHeadDim, kWalk, true>;
      return launch_walk<Config, backward_kernel<Config>>(params, buffers, stream);
    }
  }
  using Config = BackwardConfig<Value, kHeadDim, kWalk, false>;
  return launch_walk<Config, backward_kernel<Config>>(params, buffers, stream);
}

template <typename Value>
cudaError_t launch_fused(const BackwardParams& params, const BackwardBuffers& buffers,
                         cudaStream_t stream) {
  using Config = FusedConfig<Value>;
  FinishGlobals finish{};
  cudaError_t status = finish_globals(params, buffers.dq_sums, &finish);
  if (status == cudaSuccess) {
    status = cudaMemsetAsync(buffers.dq_sums, 0, buffers.dq_sums_bytes, stream);
  }
  if (status == cudaSuccess) {
    status = launch_walk<Config, fused_backward_kernel<Config>>(params, buffers, stream);
  }
  if (status != cudaSuccess) return status;
  return launch<finish_queries<Value>>(2 * query_units(params.problem), 128, kFinishSharedBytes,
                                       stream, finish);
}

template <typename Value, int kHeadDim, bool kCoarse>
cudaError_t launch_backward(const BackwardParams& params, const Allocate& allocate,
                            cudaStream_t stream) {
  const bool fused = kCoarse && is_fused(params);
  BackwardBuffers buffers{};
  place_buffers(buffers, params, fused, allocate(place_buffers(buffers, params, fused, nullptr)));
  cudaError_t status =
      launch<prepare_backward<Value>>(query_units(params.problem), kPrepareThreads, 0, stream,
                                      prepare_globals(params, buffers.statistics));
  if (status != cudaSuccess) return status;
  if constexpr (kCoarse && kHeadDim == 128) {
    if (fused) return launch_fused<Value>(params, buffers, stream);
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
cudaError_t launch_backward(const BackwardParams& params, const Allocate& allocate,
                            cudaStream_t stream) {
  if (!is_legal(params.problem)) return cudaErrorInvalidValue;
  const bool narrow = params.problem.head_dim <= 64;
  if (params.problem.element == Element::kFloat16) {
    return narrow ? launch_backward<kittens::half, 64, kCoarse>(params, allocate, stream)
                  : launch_backward<kittens::half, 128, kCoarse>(params, allocate, stream);
  }
  return narrow ? launch_backward<kittens::bf16, 64, kCoarse>(params, allocate, stream)
                : launch_backward<kittens::bf16, 128, kCoarse>(params, allocate, stream);
}

}  // namespace video_attn::hopper
