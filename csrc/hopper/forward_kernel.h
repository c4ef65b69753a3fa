// The forward kernel of every list of key blocks and of dense attention: persistent blocks of
// threads with two consumer warpgroups and a producer warpgroup, whose warps fill the ring and
// schedule the tiles.
#pragma once

#include "hopper/consumer.h"
#include "hopper/launch.h"
#include "hopper/launch_kernel.h"
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

// The order in which tiles run: planned from the lists, or as they stand. Then every block of
// threads has its turns; in long launches it draws tickets, so that one which started late does
// less.
template <Grain kGrain>
cudaError_t make_schedule(const ForwardParams& params, const ForwardPlan& plan,
                          const Allocate& allocate, cudaStream_t stream,
                          ForwardArguments& arguments) {
  Schedule& schedule = arguments.schedule;
  schedule = plan_shape(params, kGrain, plan.blocks);
  if (needs_plan(params)) {
    place_schedule(schedule, allocate(place_schedule(schedule, nullptr)));
    const int64_t blocks = static_cast<int64_t>(schedule.batches) * schedule.heads * kClusterBlocks;
    return launch<plan_tiles<kGrain>>(blocks, kPlanThreads, sizeof(SortMemory), stream,
                                      arguments.shape, schedule);
  }
  if (!plan.draws_dense_tiles) return cudaSuccess;
  schedule.ticket = static_cast<int32_t*>(allocate(sizeof(*schedule.ticket)));
  return cudaMemsetAsync(schedule.ticket, 0, sizeof(*schedule.ticket), stream);
}

inline cudaError_t count_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

template <Grain kGrain, int32_t kHeadDim>
cudaError_t launch_forward(const ForwardParams& params, const Allocate& allocate,
                           cudaStream_t stream) {
  constexpr int32_t kSharedBytes = forward_config(kGrain, kHeadDim).shared_bytes();
  ForwardArguments arguments;
  arguments.shape = {params.problem, params.lists};
  arguments.lse = params.lse;
  int processors = 0;
  cudaError_t status = count_multiprocessors(&processors);
  if (status != cudaSuccess) return status;
  const ForwardPlan plan = plan_forward(kGrain, params.problem, processors);
  if (plan.tiles > INT32_MAX) return cudaErrorInvalidValue;
  status = make_forward_maps(params, arguments);
  if (status != cudaSuccess) return status;
  status = make_schedule<kGrain>(params, plan, allocate, stream, arguments);
  if (status != cudaSuccess) return status;
  return params.problem.element == Element::kFloat16
             ? launch<forward_kernel<kGrain, kHeadDim, kittens::half>>(
                   plan.blocks, kForwardThreads, kSharedBytes, stream, arguments)
             : launch<forward_kernel<kGrain, kHeadDim, kittens::bf16>>(
                   plan.blocks, kForwardThreads, kSharedBytes, stream, arguments);
}

template <Grain kGrain>
cudaError_t launch_forward(const ForwardParams& params, const Allocate& allocate,
                           cudaStream_t stream) {
  const Problem& problem = params.problem;
  const bool paired = kGrain == Grain::kFine && params.lists.counts != nullptr;
  if (paired && (problem.q_side.block_size != kUnit || problem.kv_side.block_size != kUnit)) {
    return cudaErrorInvalidValue;  // fine lists are of blocks of 64
  }
  return padded_head_dim(problem.head_dim) == 64
             ? launch_forward<kGrain, 64>(params, allocate, stream)
             : launch_forward<kGrain, 128>(params, allocate, stream);
}

}  // namespace video_attn::hopper
