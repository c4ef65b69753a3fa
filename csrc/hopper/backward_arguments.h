// Host side: what the kernels of a backward are given, from what the launcher is given.
#pragma once

#include "hopper/backward_fused.h"
#include "hopper/backward_order.h"
#include "hopper/backward_prepare.h"
#include "hopper/layout.h"
#include "hopper/tensor_map.h"

namespace video_attn::hopper {

inline bool shares_lists(const Side& side) { return side.block_size % (2 * kUnit) == 0; }

// Whether the fused walk serves: 128 keys of one block at a time, sums in any order.
inline bool is_fused(const BackwardParams& params) {
  return !params.deterministic && params.problem.head_dim > 64 &&
         shares_lists(params.problem.kv_side);
}

// Units of 64 queries, or keys, of all heads and batches.
inline int64_t query_units(const Problem& problem) {
  return static_cast<int64_t>(units_of(problem.q_side.length)) * problem.heads * problem.batch;
}
inline int64_t key_units(const Problem& problem) {
  return static_cast<int64_t>(units_of(problem.kv_side.length)) * problem.kv_heads * problem.batch;
}

// Device memory that the kernels share.
struct BackwardBuffers {
  float* statistics;
  int32_t *key_order, *query_order;
  float* dq_sums;
  size_t dq_sums_bytes;
};

// Lays the buffers out from `base` on, which may be null, and returns their size.
inline size_t place_buffers(BackwardBuffers& buffers, const BackwardParams& params, bool fused,
                            void* base) {
  const Problem& problem = params.problem;
  const int64_t q_units = query_units(problem), kv_units = key_units(problem);
  const bool listed = params.lists.counts != nullptr;
  Layout layout{base};
  layout.place(buffers.statistics, q_units * 2 * kUnit);
  layout.place(buffers.key_order, listed ? kv_units : 0);
  layout.place(buffers.query_order, listed ? q_units : 0);
  const size_t before = layout.bytes;
  layout.place(buffers.dq_sums, fused ? q_units * kSumsOfUnit : 0);
  buffers.dq_sums_bytes = layout.bytes - before;
  return layout.bytes;
}

inline PrepareGlobals prepare_globals(const BackwardParams& params, float* statistics) {
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
  return globals;
}

template <typename Config>
OrderGlobals order_globals(const BackwardParams& params, const BackwardBuffers& buffers) {
  constexpr bool kKeys = Config::kWalk == Walk::kKeys;
  const Problem& problem = params.problem;
  const Side& kept = kKeys ? problem.kv_side : problem.q_side;
  OrderGlobals globals{};
  globals.lists = kKeys ? params.transposed : params.lists;
  globals.order = kKeys ? buffers.key_order : buffers.query_order;
  globals.items = (units_of(kept.length) + Config::kRingReaders - 1) / Config::kRingReaders;
  globals.block_items = kept.block_size / (kUnit * Config::kRingReaders);
  globals.list_heads = kKeys ? problem.heads / problem.kv_heads : 1;
  globals.batches = globals.lists.counts_batch_stride == 0 ? 1 : problem.batch;
  globals.heads = globals.lists.counts_head_stride == 0 ? 1
                  : kKeys                               ? problem.kv_heads
                                                        : problem.heads;
  return globals;
}

template <typename Config>
cudaError_t walk_globals(const BackwardParams& params, const BackwardBuffers& buffers,
                         BackwardGlobals* result) {
  constexpr bool kKeys = Config::kWalk == Walk::kKeys;
  const Problem& problem = params.problem;
  const Extents q_extents{problem.batch, problem.heads, problem.q_side.length, problem.head_dim};
  const Extents kv_extents{problem.batch, problem.kv_heads, problem.kv_side.length,
                           problem.head_dim};
  const Extents& kept_extents = kKeys ? kv_extents : q_extents;
  const Extents& streamed_extents = kKeys ? q_extents : kv_extents;

  BackwardGlobals& globals = *result;
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

  globals.statistics = buffers.statistics;
  globals.dq_sums = buffers.dq_sums;
  globals.lists = kKeys ? params.transposed : params.lists;
  globals.kept = kKeys ? problem.kv_side : problem.q_side;
  globals.streamed = kKeys ? problem.q_side : problem.kv_side;
  globals.group = problem.heads / problem.kv_heads;
  globals.list_heads = kKeys ? globals.group : 1;
  globals.heads = problem.heads;
  globals.kept_heads = kKeys ? problem.kv_heads : problem.heads;
  globals.units = units_of(globals.kept.length);
  globals.tiles = (globals.units + Config::kWarpgroups - 1) / Config::kWarpgroups;
  if (globals.lists.counts != nullptr) {
    const OrderGlobals order = order_globals<Config>(params, buffers);
    globals.order = order.order;
    globals.order_head_stride = order.heads > 1 ? order.items : 0;
    globals.order_batch_stride =
        order.batches > 1 ? static_cast<int64_t>(order.heads) * order.items : 0;
  }
  globals.scale = problem.scale;
  globals.scale_log2 = problem.scale * 1.4426950408889634f;
  return cudaSuccess;
}

inline cudaError_t finish_globals(const BackwardParams& params, float* dq_sums,
                                  FinishGlobals* globals) {
  const Problem& problem = params.problem;
  const Extents extents{problem.batch, problem.heads, problem.q_side.length, problem.head_dim};
  globals->sums = dq_sums;
  globals->q_side = problem.q_side;
  globals->heads = problem.heads;
  globals->units = units_of(problem.q_side.length);
  globals->scale = problem.scale;
  return make_tensor_map(&globals->dq, params.dq, extents, problem.element, kUnit);
}

}  // namespace video_attn::hopper
