// Host side: what the kernels of a backward are given, from what the launcher is given.
#pragma once

#include "hopper/backward_fused.h"
#include "hopper/backward_order.h"
#include "hopper/backward_prepare.h"
#include "hopper/tensor_map.h"

namespace video_attn::hopper {

inline size_t align_bytes(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline bool shares_lists(const Side& side) { return side.block_size % (2 * kUnit) == 0; }

// Whether the fused walk serves: 128 keys of one block at a time, sums in any order.
inline bool is_fused(const BackwardParams& params) {
  return !params.deterministic && params.problem.head_dim > 64 &&
         shares_lists(params.problem.kv_side);
}

// Where the parts of the workspace begin, in bytes.
struct BackwardWorkspace {
  size_t statistics, key_order, query_order, dq_sums, bytes;
};

inline BackwardWorkspace lay_out_workspace(const BackwardParams& params, bool fused) {
  const Problem& problem = params.problem;
  const size_t q_units =
      static_cast<size_t>(problem.batch) * problem.heads * units_of(problem.q_side.length);
  const size_t kv_units =
      static_cast<size_t>(problem.batch) * problem.kv_heads * units_of(problem.kv_side.length);
  BackwardWorkspace workspace{};
  size_t end = 0;
  const auto take = [&](size_t bytes) {
    const size_t start = end;
    end += align_bytes(bytes);
    return start;
  };
  workspace.statistics = take(q_units * (2 * kUnit * sizeof(float)));
  workspace.key_order = take(kv_units * sizeof(int32_t));
  workspace.query_order = take(q_units * sizeof(int32_t));
  workspace.dq_sums = take(fused ? q_units * (kSumsOfUnit * sizeof(float)) : 0);
  workspace.bytes = end;
  return workspace;
}

// The pointers into a workspace that the kernels share.
struct BackwardBuffers {
  float* statistics;
  int32_t *key_order, *query_order;
  float* dq_sums;

  BackwardBuffers(void* base, const BackwardWorkspace& workspace)
      : statistics(at<float>(base, workspace.statistics)),
        key_order(at<int32_t>(base, workspace.key_order)),
        query_order(at<int32_t>(base, workspace.query_order)),
        dq_sums(at<float>(base, workspace.dq_sums)) {}

 private:
  template <typename T>
  static T* at(void* base, size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
  }
};

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

inline int64_t blocks_of(const BackwardParams& params, const FinishGlobals& globals) {
  return static_cast<int64_t>(globals.units) * globals.heads * params.problem.batch * 2;
}
inline int64_t blocks_of(const BackwardParams&, const OrderGlobals& globals) {
  const int64_t chunks = (globals.items + kOrderThreads - 1) / kOrderThreads;
  return chunks * globals.heads * globals.batches;
}
inline int64_t blocks_of(const BackwardParams& params, const PrepareGlobals& globals) {
  return static_cast<int64_t>(globals.units) * globals.heads * params.problem.batch;
}
inline int64_t blocks_of(const BackwardParams& params, const BackwardGlobals& globals) {
  return static_cast<int64_t>(globals.tiles) * globals.kept_heads * params.problem.batch;
}

}  // namespace video_attn::hopper
