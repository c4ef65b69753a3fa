// The schedule of a forward launch, made on the device: how many halves of keys each row of the
// lists has, and in which order the query tiles run. Heads run one after another, so that the keys
// and values of few heads are in L2 at a time; within a head the heaviest tiles run first, and
// blocks of threads take the next tile as they get free. Tiles that one block would still run when
// the others are done with the whole head (text, which sees everything) lead: those of all heads
// run first, or the last head would begin its own when little else is left.
#pragma once

#include "hopper/config.h"
#include "hopper/heaviest_first.h"
#include "hopper/layout.h"
#include "hopper/params.h"
#include "hopper/primitives.h"
#include "hopper/step_list.h"

namespace video_attn::hopper {

// Lists that are the same for all batches or heads are planned once: their dimension is 1 here.
struct Schedule {
  int32_t* ticket;     // the next tile to run; null: block b runs the tiles b, b + blocks, ...
  HalfCounts* halves;  // [batches, heads, rows]; null: every row sees all keys
  int32_t* order;      // [batches, heads, tiles]; null: as they stand
  int32_t* leading;    // [batches, heads]: how many at the beginning of each order lead
  int32_t* common;     // [batches, heads, tiles]: full blocks in both lists of a fine tile
  int32_t* paired;     // [batches, heads, rows, longest]: lists in paired order; null: as given
  int32_t batches, heads, rows, tiles, longest;
  int32_t blocks;  // of threads, of the launch
};

// What planning and the kernels need to know of a problem besides its tensors.
struct ForwardShape {
  Problem problem;
  BlockLists lists;
};

inline Schedule plan_shape(const ForwardParams& params, Grain grain, int32_t blocks) {
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
  schedule.blocks = blocks;
  return schedule;
}

// Rows that all see every key need no plan.
inline bool needs_plan(const ForwardParams& params) {
  return params.lists.counts != nullptr || params.problem.kv_side.lens.data != nullptr;
}

// Lays the schedule out from `base` on, which may be null, and returns its size.
inline size_t place_schedule(Schedule& schedule, void* base) {
  const int64_t lists = static_cast<int64_t>(schedule.batches) * schedule.heads;
  Layout layout{base};
  layout.place(schedule.ticket, 1);
  layout.place(schedule.halves, lists * schedule.rows);
  layout.place(schedule.order, lists * schedule.tiles);
  layout.place(schedule.leading, lists);
  if (schedule.longest > 0) {
    layout.place(schedule.common, lists * schedule.tiles);
    layout.place(schedule.paired, lists * schedule.rows * schedule.longest);
  }
  return layout.bytes;
}

__device__ inline int32_t warp_sum(int32_t value) {
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  return value;
}

// Which plan serves a batch and a head.
__device__ inline int64_t list_of(const Schedule& schedule, int32_t batch, int32_t head) {
  return static_cast<int64_t>(schedule.batches == 1 ? 0 : batch) * schedule.heads +
         (schedule.heads == 1 ? 0 : head);
}

// The list of one row in the order of its steps.
__device__ inline RowList planned_list(const ForwardShape& shape, const Schedule& schedule,
                                       int32_t batch, int32_t head, int32_t row) {
  RowList list = row_list(shape.lists, shape.problem.kv_side, batch, head, row);
  if (schedule.paired != nullptr) {
    const int64_t at = list_of(schedule, batch, head) * schedule.rows + row;
    list.indices = schedule.paired + at * schedule.longest;
    list.stride = 1;
  }
  return list;
}

// A warp counts the halves of a row.
__device__ inline void count_halves(const ForwardShape& shape, const Schedule& schedule,
                                    int32_t batch, int32_t head, int32_t row) {
  const Side& keys = shape.problem.kv_side;
  const RowList list = row_list(shape.lists, keys, batch, head, row);
  HalfCounts counts{0, 0};
  for (int32_t entry = threadIdx.x % 32; entry < list.count; entry += 32) {
    counts.add(valid_tokens(keys, batch, list.block(entry)));
  }
  counts.full = warp_sum(counts.full);
  counts.all = warp_sum(counts.all);
  if (threadIdx.x % 32 == 0) {
    schedule.halves[list_of(schedule, batch, head) * schedule.rows + row] = counts;
  }
}

// A warp puts the two lists of a fine tile in paired order, and counts their halves.
__device__ inline void pair_lists(const ForwardShape& shape, const Schedule& schedule,
                                  int32_t batch, int32_t head, int32_t tile) {
  const int64_t plan = list_of(schedule, batch, head);
  const int32_t lane = threadIdx.x % 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
  const Side& keys = shape.problem.kv_side;
  for (int32_t row = tile * kConsumers; row < min(tile * kConsumers + 2, schedule.rows); ++row) {
    const RowList own = row_list(shape.lists, keys, batch, head, row);
    RowList other{nullptr, 0, 0};
    if ((row ^ 1) < schedule.rows) other = row_list(shape.lists, keys, batch, head, row ^ 1);
    int32_t* paired = schedule.paired + (plan * schedule.rows + row) * schedule.longest;
    HalfCounts counts{0, 0};
    int32_t common_count = 0, own_count = 0;
    for (int32_t first = 0; first < own.count; first += 32) {
      const bool exists = first + lane < own.count;
      const int32_t block = exists ? own.block(first + lane) : 0;
      const int32_t valid = exists ? valid_tokens(keys, batch, block) : 0;
      const bool common =
          valid == kUnit && holds_block(other.indices, other.stride, other.count, block);
      const uint32_t common_lanes = __ballot_sync(~0u, common);
      const uint32_t own_lanes = __ballot_sync(~0u, exists) & ~common_lanes;
      const int32_t place = paired_place(common, common_count + __popc(common_lanes & lower_lanes),
                                         own_count + __popc(own_lanes & lower_lanes), own.count);
      if (exists) paired[place] = block;
      counts.add(valid);
      common_count += __popc(common_lanes);
      own_count += __popc(own_lanes);
    }
    counts.full = warp_sum(counts.full);
    counts.all = warp_sum(counts.all);
    if (lane == 0) {
      schedule.halves[plan * schedule.rows + row] = counts;
      schedule.common[plan * schedule.tiles + tile] = common_count;  // of either row the same
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
  const int32_t valid = exists ? valid_tokens(queries, batch, rows.row) - offset : 0;
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

// How many of the tiles, which heaviest_first has ordered, take longer than a block of threads has
// for the whole head; nearly always none. The threads that ordered them count.
template <class Steps>
__device__ void count_leading(const SortMemory& memory, int32_t tiles, int32_t blocks,
                              int32_t* leading, Steps steps) {
  float total = 0;
  for (const float weights : memory.warp_weights) total += weights;
  const auto leads = [&](int32_t count) { return static_cast<float>(count) * blocks > total; };
  if (threadIdx.x == 0) *leading = 0;
  if (!leads(memory.heaviest)) return;
  threads_sync<kSortThreads>(kSortBarrier);
  for (int32_t tile = threadIdx.x; tile < tiles; tile += kSortThreads) {
    if (leads(steps(tile))) atomicAdd(leading, 1);
  }
}

constexpr int32_t kPlanThreads = 512;

// A cluster of blocks of threads plans one list: its warps count or pair the rows, then the first
// block orders the tiles.
template <Grain kGrain>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kPlanThreads)
    plan_tiles(const __grid_constant__ ForwardShape shape,
               const __grid_constant__ Schedule schedule) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *schedule.ticket = 0;
  const int32_t list = blockIdx.x / kClusterBlocks, part = blockIdx.x % kClusterBlocks;
  const int32_t batch = list / schedule.heads, head = list % schedule.heads;
  constexpr int32_t kWarps = kPlanThreads / 32;
  const int32_t first = part * kWarps + threadIdx.x / 32;
  if (schedule.paired != nullptr) {
    for (int32_t tile = first; tile < schedule.tiles; tile += kClusterBlocks * kWarps) {
      pair_lists(shape, schedule, batch, head, tile);
    }
  } else {
    for (int32_t row = first; row < schedule.rows; row += kClusterBlocks * kWarps) {
      count_halves(shape, schedule, batch, head, row);
    }
  }
  cluster_sync();
  if (part > 0 || threadIdx.x >= kSortThreads) return;
  int32_t* order = schedule.order + static_cast<int64_t>(list) * schedule.tiles;
  const auto steps = [&](int32_t tile) {
    return tile_steps<kGrain>(shape, schedule, batch, head, tile);
  };
  auto& memory = *reinterpret_cast<SortMemory*>(shared_memory());
  heaviest_first(memory, schedule.tiles, order, steps);
  count_leading(memory, schedule.tiles, schedule.blocks, schedule.leading + list, steps);
}

}  // namespace video_attn::hopper
