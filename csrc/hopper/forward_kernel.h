// The forward kernel of every list of key blocks and of dense attention: persistent blocks of
// threads with two consumer warpgroups and a producer warpgroup, whose warps fill the ring and
// schedule the tiles.
#pragma once

#include "hopper/consumer.h"
#include "hopper/producer.h"
#include "hopper/tensor_map.h"

namespace video_attn::hopper {

template <Grain kGrain, int32_t kHeadDim, class Element>
__global__ void __launch_bounds__(kForwardThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  constexpr ForwardConfig kConfig = forward_config(kGrain, kHeadDim);
  const SharedMemory<kConfig> shared(shared_memory());
  if (threadIdx.x == 0) {
    shared.init_barriers();
    for (const CUtensorMap* map : {&arguments.q, &arguments.k, &arguments.v, &arguments.out}) {
      prefetch_tensor_map(map);
    }
  }
  __syncthreads();

  const int32_t warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == kConsumers) {
    give_registers<kProducerRegisters>();
    const int32_t warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
    if (warp < kProducers<kGrain>) {
      Producer<kConfig>(arguments, shared, warp).run();
    } else if (warp == kProducers<kGrain>) {
      schedule_tiles<kConfig>(arguments, shared);
    }
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<kConfig, Element>(arguments, shared, warpgroup).run();
  }
}

template <Grain kGrain, int32_t kHeadDim, class Element>
cudaError_t launch_kernel(const ForwardArguments& arguments, cudaStream_t stream) {
  constexpr int32_t kSharedBytes = forward_config(kGrain, kHeadDim).shared_bytes();
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const auto kernel = forward_kernel<kGrain, kHeadDim, Element>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const ForwardPlan plan = plan_forward(kGrain, arguments.shape.problem, processors);
  return launch_blocks(kernel, plan.blocks, kForwardThreads, kSharedBytes, stream, arguments);
}

inline cudaError_t make_forward_maps(const ForwardParams& params, ForwardArguments& arguments) {
  const Problem& problem = params.problem;
  const Extents queries{problem.batch, problem.heads, problem.q_side.length, problem.head_dim};
  const Extents keys{problem.batch, problem.kv_heads, problem.kv_side.length, problem.head_dim};
  cudaError_t status = cudaSuccess;
  const auto make = [&](CUtensorMap& map, const Tensor4& tensor, const Extents& extents) {
    if (status != cudaSuccess) return;
    status = make_tensor_map(&map, tensor, extents, problem.element, kUnit);
  };
  make(arguments.q, params.q, queries);
  make(arguments.k, params.k, keys);
  make(arguments.v, params.v, keys);
  make(arguments.out, params.out, queries);
  return status;
}

inline size_t forward_workspace(const ForwardParams& params, Grain grain) {
  Schedule schedule = plan_shape(params, grain);
  return needs_plan(params) ? place_schedule(schedule, nullptr) : 0;
}

template <Grain kGrain, int32_t kHeadDim>
cudaError_t launch_forward(const ForwardParams& params, void* workspace, cudaStream_t stream) {
  ForwardArguments arguments;
  arguments.shape = {params.problem, params.lists};
  arguments.schedule = plan_shape(params, kGrain);
  arguments.lse = params.lse;
  cudaError_t status = make_forward_maps(params, arguments);
  if (status != cudaSuccess) return status;
  if (needs_plan(params)) {
    place_schedule(arguments.schedule, workspace);
    status = launch_schedule<kGrain>(arguments.shape, arguments.schedule, stream);
    if (status != cudaSuccess) return status;
  }
  return params.problem.element == Element::kFloat16
             ? launch_kernel<kGrain, kHeadDim, kittens::half>(arguments, stream)
             : launch_kernel<kGrain, kHeadDim, kittens::bf16>(arguments, stream);
}

template <Grain kGrain>
cudaError_t launch_forward(const ForwardParams& params, void* workspace, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const bool paired = kGrain == Grain::kFine && params.lists.counts != nullptr;
  if (paired && (problem.q_side.block_size != kUnit || problem.kv_side.block_size != kUnit)) {
    return cudaErrorInvalidValue;  // fine lists are of blocks of 64
  }
  return padded_head_dim(problem.head_dim) == 64
             ? launch_forward<kGrain, 64>(params, workspace, stream)
             : launch_forward<kGrain, 128>(params, workspace, stream);
}

}  // namespace video_attn::hopper
