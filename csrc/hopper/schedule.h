// The schedule of a forward launch, made on the device: how many halves of keys each row of the
// lists has, and in which order the query tiles run. Heads run one after another, so that the keys
// and values of few heads are in L2 at a time; within a head the heaviest tiles run first, and
// blocks of threads take the next tile as they get free.
#pragma once

#include <type_traits>

#include "hopper/config.h"
#include "hopper/params.h"
#include "hopper/primitives.h"
#include "hopper/step_list.h"

namespace video_attn::hopper {

// Lists that are the same for all batches or heads are planned once: their dimension is 1 here.
struct Schedule {
  int32_t* ticket;     // the next tile to run; null: block b runs the tiles b, b + blocks, ...
  HalfCounts* halves;  // [batches, heads, rows]; null: every row sees all keys
  int32_t* order;      // [batches, heads, tiles]; null: as they stand
  int32_t* common;     // [batches, heads, tiles]: full blocks in both lists of a fine tile
  int32_t* paired;     // [batches, heads, rows, longest]: lists in paired order; null: as given
  int32_t batches, heads, rows, tiles, longest;
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
  schedule.longest = listed && grain == Grain::kFine ? lists.longest : 0;
  return schedule;
}

// Rows that all see every key need no plan.
inline bool needs_plan(const ForwardParams& params) {
  return params.lists.counts != nullptr || params.problem.kv_side.lens.data != nullptr;
}

inline size_t list_count(const Schedule& schedule) {
  return static_cast<size_t>(schedule.batches) * schedule.heads;
}

// Lays the schedule out from `workspace` on, which may be null, and returns its size.
inline size_t place_schedule(Schedule& schedule, void* workspace) {
  const size_t lists = list_count(schedule);
  size_t bytes = 0;
  const auto place = [&](auto*& array, size_t length) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(
        static_cast<char*>(workspace) + bytes);
    bytes += (length * sizeof(*array) + 255) / 256 * 256;
  };
  place(schedule.ticket, 1);
  place(schedule.halves, lists * schedule.rows);
  place(schedule.order, lists * schedule.tiles);
  if (schedule.longest > 0) {
    place(schedule.common, lists * schedule.tiles);
    place(schedule.paired, lists * schedule.rows * schedule.longest);
  }
  return bytes;
}

// The list of one row: where its indices lie, and how many there are.
struct RowList {
  const int32_t* indices;  // null: entry i is block i
  int64_t stride;
  int32_t count;

  __device__ int32_t block(int32_t entry) const {
    return indices == nullptr ? entry : indices[entry * stride];
  }
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
constexpr int32_t kWarpsPerPlanBlock = kPlanThreads / 32;

// Which plan serves a batch and a head.
__device__ inline int64_t list_of(const Schedule& schedule, int32_t batch, int32_t head) {
  return static_cast<int64_t>(schedule.batches == 1 ? 0 : batch) * schedule.heads +
         (schedule.heads == 1 ? 0 : head);
}

// The list of one row in the order of its steps.
__device__ inline RowList planned_list(const ForwardShape& shape, const Schedule& schedule,
                                       int32_t batch, int32_t head, int32_t row) {
  RowList list = row_list(shape, batch, head, row);
  if (schedule.paired != nullptr) {
    const int64_t at = list_of(schedule, batch, head) * schedule.rows + row;
    list.indices = schedule.paired + at * schedule.longest;
    list.stride = 1;
  }
  return list;
}

// One warp counts the halves of one row.
static __global__ void __launch_bounds__(kPlanThreads)
    count_halves(const ForwardShape shape, const Schedule schedule) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *schedule.ticket = 0;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarpsPerPlanBlock + threadIdx.x / 32;
  const int64_t list = at / schedule.rows;
  if (list >= static_cast<int64_t>(schedule.batches) * schedule.heads) return;
  const auto batch = static_cast<int32_t>(list / schedule.heads);
  const auto head = static_cast<int32_t>(list % schedule.heads);
  const Side& keys = shape.problem.kv_side;
  const int32_t* lens = batch_lens(keys.lens, batch);
  const RowList entries =
      row_list(shape, batch, head, static_cast<int32_t>(at - list * schedule.rows));
  HalfCounts counts{0, 0};
  for (int32_t entry = threadIdx.x % 32; entry < entries.count; entry += 32) {
    counts.add(valid_tokens(entries.block(entry), keys.block_size, keys.length, lens));
  }
  counts.full = warp_sum(counts.full);
  counts.all = warp_sum(counts.all);
  if (threadIdx.x % 32 == 0) schedule.halves[at] = counts;
}

// One warp puts the two lists of one fine tile in paired order, and counts their halves.
static __global__ void __launch_bounds__(kPlanThreads)
    pair_lists(const ForwardShape shape, const Schedule schedule) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *schedule.ticket = 0;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarpsPerPlanBlock + threadIdx.x / 32;
  const int64_t list = at / schedule.tiles;
  if (list >= static_cast<int64_t>(schedule.batches) * schedule.heads) return;
  const auto batch = static_cast<int32_t>(list / schedule.heads);
  const auto head = static_cast<int32_t>(list % schedule.heads);
  const int32_t tile = static_cast<int32_t>(at - list * schedule.tiles);
  const int32_t lane = threadIdx.x % 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
  const Side& keys = shape.problem.kv_side;
  const int32_t* lens = batch_lens(keys.lens, batch);
  for (int32_t row = tile * kConsumers; row < min(tile * kConsumers + 2, schedule.rows); ++row) {
    const RowList own = row_list(shape, batch, head, row);
    RowList other{nullptr, 0, 0};
    if ((row ^ 1) < schedule.rows) other = row_list(shape, batch, head, row ^ 1);
    int32_t* paired = schedule.paired + (list * schedule.rows + row) * schedule.longest;
    HalfCounts counts{0, 0};
    int32_t common_count = 0, own_count = 0;
    for (int32_t first = 0; first < own.count; first += 32) {
      const bool exists = first + lane < own.count;
      const int32_t block = exists ? own.block(first + lane) : 0;
      const int32_t valid = exists ? valid_tokens(block, keys.block_size, keys.length, lens) : 0;
      const bool common =
          valid == kUnit && holds_block(other.indices, other.stride, other.count, block);
      const uint32_t common_lanes = __ballot_sync(~0u, common);
      const uint32_t own_lanes = __ballot_sync(~0u, exists) & ~common_lanes;
      const int32_t place = paired_place(common, common_count + __popc(common_lanes & lower_lanes),
                                         own_count + __popc(own_lanes & lower_lanes), own.count);
      if (exists) paired[place] = block;
      common_count += __popc(common_lanes);
      own_count += __popc(own_lanes);
      counts.add(valid);
    }
    counts.full = warp_sum(counts.full);
    counts.all = warp_sum(counts.all);
    if (lane == 0) {
      schedule.halves[list * schedule.rows + row] = counts;
      schedule.common[at] = common_count;  // of either row the same
    }
  }
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
  return schedule.halves[list_of(schedule, batch, head) * schedule.rows + rows.row];
}

// Steps that the consumers of a fine tile share, given the halves of each.
__device__ inline int32_t tile_shared_steps(const Schedule& schedule, int32_t batch, int32_t head,
                                            int32_t tile, const HalfCounts& first,
                                            const HalfCounts& second) {
  if (first.all == 0 || second.all == 0) return 0;
  const int32_t common =
      schedule.paired == nullptr
          ? first.full  // every row sees all keys
          : schedule.common[list_of(schedule, batch, head) * schedule.tiles + tile];
  return shared_steps(common);
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

// Shared memory of order_tiles().
struct OrderMemory {
  int32_t places[kWeightClasses * kPlanThreads];
  int32_t warp_totals[kPlanThreads / 32];
  int32_t heaviest;
};

// One block orders the tiles of one list: a stable counting sort by weight class. Every thread owns
// a run of tiles and, for each class, a counter that becomes the place of its next tile.
template <Grain kGrain>
__global__ void __launch_bounds__(kPlanThreads)
    order_tiles(const ForwardShape shape, const Schedule schedule) {
  auto& [places, warp_totals, heaviest] = *reinterpret_cast<OrderMemory*>(shared_memory());
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
  const auto lists = static_cast<int64_t>(list_count(schedule));
  const bool paired = schedule.paired != nullptr;
  const int64_t warps = lists * (paired ? schedule.tiles : schedule.rows);
  const auto blocks = static_cast<uint32_t>((warps + kWarpsPerPlanBlock - 1) / kWarpsPerPlanBlock);
  const cudaError_t status = launch_blocks(paired ? pair_lists : count_halves, blocks, kPlanThreads,
                                           0, stream, shape, schedule);
  if (status != cudaSuccess) return status;
  return launch_blocks(order_tiles<kGrain>, static_cast<uint32_t>(lists), kPlanThreads,
                       sizeof(OrderMemory), stream, shape, schedule);
}

}  // namespace video_attn::hopper
