// The schedule of a forward launch, made on the device: how many halves of keys each row of the
// lists has, and in which order the query tiles run. Heads run one after another, so that the keys
// and values of few heads are in L2 at a time; within a head the heaviest tiles run first, and
// blocks of threads take the next tile as they get free.
#pragma once

#include <cuda_runtime.h>

#include "hopper/config.h"
#include "hopper/params.h"
#include "hopper/step_list.h"

namespace video_attn::hopper {

// Lists that are the same for all batches or heads are planned once: their dimension is 1 here.
struct Schedule {
  int32_t* ticket;     // the next tile to run; null: block b runs the tiles b, b + blocks, ...
  HalfCounts* halves;  // [batches, heads, rows]; null: every row sees all keys
  int32_t* order;      // [batches, heads, tiles]; null: as they stand
  int32_t batches, heads, rows, tiles;
};

// What planning and the kernels need to know of a problem besides its tensors.
struct ForwardShape {
  Problem problem;
  BlockLists lists;
};

inline Schedule plan_shape(const ForwardParams& params, Grain grain) {
  const Problem& problem = params.problem;
  const BlockLists& lists = params.lists;
  const bool listed = lists.counts != nullptr;
  const bool batch_matters =
      (listed && (lists.counts_batch_stride != 0 || lists.indices_batch_stride != 0)) ||
      (problem.kv_side.lens.data != nullptr && problem.kv_side.lens.batch_stride != 0) ||
      (problem.q_side.lens.data != nullptr && problem.q_side.lens.batch_stride != 0);
  const bool head_matters =
      listed && (lists.counts_head_stride != 0 || lists.indices_head_stride != 0);
  Schedule schedule{};
  schedule.batches = batch_matters ? problem.batch : 1;
  schedule.heads = head_matters ? problem.heads : 1;
  schedule.rows = divide_up(problem.q_side.length, problem.q_side.block_size);
  schedule.tiles = query_tiles(grain, problem.q_side.length, problem.q_side.block_size);
  return schedule;
}

// Rows that all see every key need no plan.
inline bool needs_plan(const ForwardParams& params) {
  return params.lists.counts != nullptr || params.problem.kv_side.lens.data != nullptr;
}

inline size_t align_workspace(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline size_t schedule_bytes(const Schedule& schedule) {
  const size_t lists = static_cast<size_t>(schedule.batches) * schedule.heads;
  return align_workspace(sizeof(int32_t)) +
         align_workspace(lists * schedule.rows * sizeof(HalfCounts)) +
         align_workspace(lists * schedule.tiles * sizeof(int32_t));
}

inline void place_schedule(Schedule& schedule, void* workspace) {
  const size_t lists = static_cast<size_t>(schedule.batches) * schedule.heads;
  char* next = static_cast<char*>(workspace);
  schedule.ticket = reinterpret_cast<int32_t*>(next);
  next += align_workspace(sizeof(int32_t));
  schedule.halves = reinterpret_cast<HalfCounts*>(next);
  next += align_workspace(lists * schedule.rows * sizeof(HalfCounts));
  schedule.order = reinterpret_cast<int32_t*>(next);
}

// The list of one row: where its indices lie, and how many there are.
struct RowList {
  const int32_t* indices;  // null: slot i is entry i
  int64_t stride;
  int32_t count;
};

__device__ inline RowList row_list(const ForwardShape& shape, int32_t batch, int32_t head,
                                   int32_t row) {
  const BlockLists& lists = shape.lists;
  const Side& keys = shape.problem.kv_side;
  if (lists.counts == nullptr) return {nullptr, 0, divide_up(keys.length, keys.block_size)};
  const int64_t count_at = batch * lists.counts_batch_stride + head * lists.counts_head_stride +
                           row * lists.counts_row_stride;
  const int64_t indices_at = batch * lists.indices_batch_stride + head * lists.indices_head_stride +
                             row * lists.indices_row_stride;
  return {lists.indices + indices_at, lists.indices_stride, lists.counts[count_at]};
}

__device__ inline const int32_t* batch_lens(const BlockLens& lens, int32_t batch) {
  return lens.data == nullptr ? nullptr : lens.data + batch * lens.batch_stride;
}

__device__ inline int32_t warp_sum(int32_t value) {
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  return value;
}

constexpr int32_t kPlanThreads = 256;
constexpr int32_t kRowsPerPlanBlock = kPlanThreads / 32;

// One warp counts the halves of one row.
static __global__ void __launch_bounds__(kPlanThreads)
    count_halves(const ForwardShape shape, const Schedule schedule) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *schedule.ticket = 0;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kRowsPerPlanBlock + threadIdx.x / 32;
  const int64_t list = at / schedule.rows;
  if (list >= static_cast<int64_t>(schedule.batches) * schedule.heads) return;
  const int32_t batch = static_cast<int32_t>(list / schedule.heads);
  const int32_t head = static_cast<int32_t>(list % schedule.heads);
  const Side& keys = shape.problem.kv_side;
  const int32_t* lens = batch_lens(keys.lens, batch);
  const RowList entries =
      row_list(shape, batch, head, static_cast<int32_t>(at - list * schedule.rows));
  HalfCounts counts{0, 0};
  for (int32_t entry = threadIdx.x % 32; entry < entries.count; entry += 32) {
    const int32_t slot =
        entries.indices == nullptr ? entry : entries.indices[entry * entries.stride];
    counts.add(valid_tokens(slot, keys.block_size, keys.length, lens));
  }
  counts.full = warp_sum(counts.full);
  counts.all = warp_sum(counts.all);
  if (threadIdx.x % 32 == 0) schedule.halves[at] = counts;
}

// The rows of queries of one consumer in a tile.
struct ConsumerRows {
  int32_t row;     // of the lists
  int32_t query;   // the first token
  int32_t stored;  // tokens to write: 0 when the rows lie past their block or the sequence
  int32_t valid;   // of which these are not padding
};

template <Grain kGrain>
__device__ inline ConsumerRows consumer_rows(const ForwardShape& shape, int32_t batch, int32_t tile,
                                             int32_t consumer) {
  const Side& queries = shape.problem.q_side;
  ConsumerRows rows;
  int32_t offset;
  if constexpr (kGrain == Grain::kCoarse) {
    const int32_t block_tiles = divide_up(queries.block_size, kTileTokens);
    rows.row = tile / block_tiles;
    offset = (tile - rows.row * block_tiles) * kTileTokens + consumer * kConsumerTokens;
  } else {
    const int32_t first = tile * kTileTokens + consumer * kConsumerTokens;
    rows.row = first / queries.block_size;
    offset = first - rows.row * queries.block_size;
  }
  rows.query = rows.row * queries.block_size + offset;
  const bool exists = offset < queries.block_size && rows.query < queries.length;
  rows.stored = exists ? min(kConsumerTokens, queries.length - rows.query) : 0;
  const int32_t* lens = batch_lens(queries.lens, batch);
  const int32_t valid =
      exists ? valid_tokens(rows.row, queries.block_size, queries.length, lens) - offset : 0;
  rows.valid = min(max(valid, 0), rows.stored);
  return rows;
}

// Halves that a consumer works through; none where it has no valid query. The consumers of a
// coarse tile share their loads, and valid queries come first, so the first one decides for all.
template <Grain kGrain>
__device__ inline HalfCounts tile_halves(const ForwardShape& shape, const Schedule& schedule,
                                         int32_t batch, int32_t head, int32_t tile,
                                         int32_t consumer) {
  const int32_t decisive = kGrain == Grain::kCoarse ? 0 : consumer;
  const ConsumerRows rows = consumer_rows<kGrain>(shape, batch, tile, decisive);
  if (rows.valid == 0) return {0, 0};
  if (schedule.halves == nullptr) return dense_halves(shape.problem.kv_side.length);
  const int64_t list = static_cast<int64_t>(schedule.batches == 1 ? 0 : batch) * schedule.heads +
                       (schedule.heads == 1 ? 0 : head);
  return schedule.halves[list * schedule.rows + rows.row];
}

template <Grain kGrain>
__device__ inline int32_t tile_steps(const ForwardShape& shape, const Schedule& schedule,
                                     int32_t batch, int32_t head, int32_t tile) {
  int32_t steps = 0;
  for (int32_t consumer = 0; consumer < kConsumers; ++consumer) {
    steps = max(steps, tile_halves<kGrain>(shape, schedule, batch, head, tile, consumer).steps());
  }
  return steps;
}

constexpr int32_t kWeightClasses = 32;

// One block orders the tiles of one list: a stable counting sort by weight class. Every thread owns
// a run of tiles and, for each class, a counter that becomes the place of its next tile.
template <Grain kGrain>
__global__ void __launch_bounds__(kPlanThreads)
    order_tiles(const ForwardShape shape, const Schedule schedule) {
  __shared__ int32_t places[kWeightClasses * kPlanThreads];
  __shared__ int32_t warp_totals[kPlanThreads / 32];
  __shared__ int32_t heaviest;
  const int32_t thread = threadIdx.x;
  const int32_t batch = blockIdx.x / schedule.heads;
  const int32_t head = blockIdx.x % schedule.heads;
  const int32_t run = divide_up(schedule.tiles, kPlanThreads);
  const int32_t first = min(thread * run, schedule.tiles);
  const int32_t last = min(first + run, schedule.tiles);
  if (thread == 0) heaviest = 1;
  for (int32_t entry = thread; entry < kWeightClasses * kPlanThreads; entry += kPlanThreads) {
    places[entry] = 0;
  }
  __syncthreads();
  int32_t heaviest_here = 1;
  for (int32_t tile = first; tile < last; ++tile) {
    heaviest_here = max(heaviest_here, tile_steps<kGrain>(shape, schedule, batch, head, tile));
  }
  atomicMax(&heaviest, heaviest_here);
  __syncthreads();
  const auto place_of = [&](int32_t tile) -> int32_t& {
    const int64_t steps = tile_steps<kGrain>(shape, schedule, batch, head, tile);
    const auto weight = static_cast<int32_t>(steps * (kWeightClasses - 1) / heaviest);
    return places[(kWeightClasses - 1 - weight) * kPlanThreads + thread];
  };
  for (int32_t tile = first; tile < last; ++tile) ++place_of(tile);
  __syncthreads();

  // Exclusive prefix sums over classes, and over threads within a class.
  int32_t total = 0;
  for (int32_t i = 0; i < kWeightClasses; ++i) total += places[thread * kWeightClasses + i];
  int32_t before = total;
  for (int32_t distance = 1; distance < 32; distance *= 2) {
    const int32_t left = __shfl_up_sync(~0u, before, distance);
    if (thread % 32 >= distance) before += left;
  }
  if (thread % 32 == 31) warp_totals[thread / 32] = before;
  __syncthreads();
  before -= total;
  for (int32_t warp = 0; warp < thread / 32; ++warp) before += warp_totals[warp];
  for (int32_t i = 0; i < kWeightClasses; ++i) {
    const int32_t count = places[thread * kWeightClasses + i];
    places[thread * kWeightClasses + i] = before;
    before += count;
  }
  __syncthreads();
  int32_t* order = schedule.order + static_cast<int64_t>(blockIdx.x) * schedule.tiles;
  for (int32_t tile = first; tile < last; ++tile) order[place_of(tile)++] = tile;
}

template <Grain kGrain>
cudaError_t launch_schedule(const ForwardShape& shape, const Schedule& schedule,
                            cudaStream_t stream) {
  const int64_t lists = static_cast<int64_t>(schedule.batches) * schedule.heads;
  const int64_t blocks = (lists * schedule.rows + kRowsPerPlanBlock - 1) / kRowsPerPlanBlock;
  count_halves<<<static_cast<uint32_t>(blocks), kPlanThreads, 0, stream>>>(shape, schedule);
  order_tiles<kGrain><<<static_cast<uint32_t>(lists), kPlanThreads, 0, stream>>>(shape, schedule);
  return cudaGetLastError();
}

}  // namespace video_attn::hopper
