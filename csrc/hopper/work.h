// What the warps of a block of threads share: the layout of shared memory, the rings of operands,
// and the work items that the scheduling warp hands to all others.
#pragma once

#include "hopper/schedule.h"
#include "hopper/tma.h"

namespace video_attn::hopper {

struct ForwardArguments {
  CUtensorMap q, k, v, out;
  ForwardShape shape;
  Schedule schedule;
  float* lse;
};

// What one consumer, and the producer that serves it, do in one tile.
struct WorkItem {
  int32_t batch, head;  // batch -1: there is no more work
  ConsumerRows rows;
  HalfCounts halves;
  int32_t turns;  // at the tensor cores, for every consumer of the tile
};

// A turn for the scores of each step, beside the values of the step before, and one for the last
// values.
__device__ inline int32_t turns_of(const HalfCounts& halves) {
  return halves.all > 0 ? halves.steps() + 1 : 0;
}

constexpr int32_t kItemStages = 2;

template <ForwardConfig kConfig>
struct Control {
  static constexpr int32_t kOperands = kConfig.rings * kConfig.slots;
  uint64_t slot_full[kOperands], slot_empty[kOperands];
  uint64_t query_full[kConsumers], query_empty[kConsumers];
  uint64_t item_full[kItemStages], item_empty[kItemStages];
  int2 slot_valid[kOperands];  // valid tokens of the two halves in a slot
  WorkItem items[kItemStages][kConsumers];
};

// A position in a cyclic buffer and the parity of its barriers.
struct RingCursor {
  int32_t slot = 0;
  uint32_t parity = 0;

  __device__ void advance(int32_t slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Shared memory of a block of threads, as the configuration lays it out.
template <ForwardConfig kConfig>
class SharedMemory {
 public:
  using ControlBlock = Control<kConfig>;
  static_assert(sizeof(ControlBlock) <= kControlBytes, "the control block outgrew its space");

  __device__ explicit SharedMemory(char* base) : base_(base) {}

  __device__ char* query(int32_t consumer) const {
    return base_ + consumer * kConfig.query_bytes();
  }
  __device__ char* output(int32_t consumer) const {
    return base_ + kConfig.output_offset() + consumer * kConfig.query_bytes();
  }
  __device__ char* slot(int32_t ring, int32_t slot) const {
    return base_ + kConfig.ring_offset() + (ring * kConfig.slots + slot) * kConfig.slot_bytes();
  }
  __device__ ControlBlock& control() const {
    return *reinterpret_cast<ControlBlock*>(base_ + kConfig.control_offset());
  }
  __device__ int2& slot_valid(int32_t ring, int32_t slot) const {
    return control().slot_valid[ring * kConfig.slots + slot];
  }
  __device__ uint32_t slot_full(int32_t ring, int32_t slot) const {
    return shared_address(&control().slot_full[ring * kConfig.slots + slot]);
  }
  __device__ uint32_t slot_empty(int32_t ring, int32_t slot) const {
    return shared_address(&control().slot_empty[ring * kConfig.slots + slot]);
  }
  __device__ uint32_t query_full(int32_t consumer) const {
    return shared_address(&control().query_full[consumer]);
  }
  __device__ uint32_t query_empty(int32_t consumer) const {
    return shared_address(&control().query_empty[consumer]);
  }
  __device__ uint32_t item_full(int32_t stage) const {
    return shared_address(&control().item_full[stage]);
  }
  __device__ uint32_t item_empty(int32_t stage) const {
    return shared_address(&control().item_empty[stage]);
  }

  // By one thread, before the barrier of the whole block. Warps arrive as one.
  __device__ void init_barriers() const {
    constexpr int32_t kWarps = 4;
    constexpr int32_t kReaders = kConsumers / kConfig.rings;  // consumers of one slot
    for (int32_t ring = 0; ring < kConfig.rings; ++ring) {
      for (int32_t at = 0; at < kConfig.slots; ++at) {
        barrier_init(slot_full(ring, at), 1);
        barrier_init(slot_empty(ring, at), kReaders * kWarps);
      }
    }
    for (int32_t consumer = 0; consumer < kConsumers; ++consumer) {
      barrier_init(query_full(consumer), 1);
      barrier_init(query_empty(consumer), kWarps);
    }
    for (int32_t stage = 0; stage < kItemStages; ++stage) {
      barrier_init(item_full(stage), 1);
      barrier_init(item_empty(stage), kConsumers * kWarps + kConfig.rings);
    }
    barrier_init_fence();
  }

 private:
  char* base_;
};

// Takes the work items of one consumer in turn.
template <ForwardConfig kConfig>
class WorkQueue {
 public:
  __device__ WorkQueue(const SharedMemory<kConfig>& shared, int32_t consumer)
      : shared_(shared), consumer_(consumer) {}

  // By a whole warp. False when there is no more.
  __device__ bool next(WorkItem& item) {
    barrier_wait(shared_.item_full(cursor_.slot), cursor_.parity);
    item = shared_.control().items[cursor_.slot][consumer_];
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_.item_empty(cursor_.slot));
    cursor_.advance(kItemStages);
    return item.batch >= 0;
  }

 private:
  const SharedMemory<kConfig>& shared_;
  int32_t consumer_;
  RingCursor cursor_;
};

// The scheduling warp: lane c makes the items of consumer c, one tile ahead of the others.
template <ForwardConfig kConfig>
__device__ void schedule_tiles(const ForwardArguments& arguments,
                               const SharedMemory<kConfig>& shared) {
  const ForwardShape& shape = arguments.shape;
  const Schedule& schedule = arguments.schedule;
  const int32_t lane = threadIdx.x % 32;
  const int32_t head_tiles = schedule.tiles;
  const int32_t tiles = shape.problem.batch * shape.problem.heads * head_tiles;
  RingCursor cursor;
  for (int32_t turn = blockIdx.x;; turn += gridDim.x) {
    int32_t next = turn;
    if (schedule.ticket != nullptr) {
      if (lane == 0) next = atomicAdd(schedule.ticket, 1);
      next = __shfl_sync(~0u, next, 0);
    }
    WorkItem item{};
    item.batch = -1;
    if (next < tiles && lane < kConsumers) {
      const int32_t list = next / head_tiles;
      item.batch = list / shape.problem.heads;
      item.head = list - item.batch * shape.problem.heads;
      int32_t tile = next - list * head_tiles;
      if (schedule.order != nullptr) {
        const int64_t order_list =
            static_cast<int64_t>(schedule.batches == 1 ? 0 : item.batch) * schedule.heads +
            (schedule.heads == 1 ? 0 : item.head);
        tile = schedule.order[order_list * head_tiles + tile];
      }
      item.rows = consumer_rows<kConfig.grain>(shape, item.batch, tile, lane);
      item.halves = tile_halves<kConfig.grain>(shape, schedule, item.batch, item.head, tile, lane);
    }
    item.turns = turns_of(item.halves);
#pragma unroll
    for (int32_t distance = 1; distance < kConsumers; distance *= 2) {
      item.turns = max(item.turns, __shfl_xor_sync(~0u, item.turns, distance));
    }
    barrier_wait(shared.item_empty(cursor.slot), cursor.parity ^ 1);
    if (lane < kConsumers) shared.control().items[cursor.slot][lane] = item;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.item_full(cursor.slot));
    cursor.advance(kItemStages);
    if (next >= tiles) return;
  }
}

}  // namespace video_attn::hopper
