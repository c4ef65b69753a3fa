// What the warps of a block of threads share: the layout of shared memory, the order in which
// operands pass through its ring, and the work items that the scheduling warp hands to all others.
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

// Named barriers; 0 is that of __syncthreads().
constexpr int32_t kTurnBarrier = 1;                              // + consumer
constexpr int32_t kConsumerBarrier = kTurnBarrier + kConsumers;  // + consumer
constexpr int32_t kProducerBarrier = kConsumerBarrier + kConsumers;

__device__ inline void named_barrier_sync(int32_t barrier, int32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int32_t barrier, int32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Turns of a consumer at the tensor cores: one for the scores of each step, beside the values of
// the step before, and one for the last values.
__device__ inline int32_t turns_of(int32_t steps) { return steps > 0 ? steps + 1 : 0; }

// One tile: what each consumer does, and the producer for them. Steps are numbered in rounds: the
// consumers share the loads of the first `shared` rounds, and have their own in the others.
struct WorkItem {
  int32_t batch, head;  // batch -1: there is no more work
  int32_t shared, rounds;
  ConsumerRows rows[kConsumers];
  HalfCounts halves[kConsumers];

  // The arrays may lie in registers, so they take no variable index.
  __device__ ConsumerRows rows_of(int32_t consumer) const {
    return consumer == 0 ? rows[0] : rows[1];
  }
  __device__ HalfCounts halves_of(int32_t consumer) const {
    return consumer == 0 ? halves[0] : halves[1];
  }
};
static_assert(kConsumers == 2, "a work item is that of two consumers");

// Warps that load: one for each list of a tile.
template <Grain kGrain>
constexpr int32_t kProducers = kGrain == Grain::kCoarse ? 1 : kConsumers;

constexpr int32_t kItemStages = 2;
constexpr int32_t kConsumerWarps = 4;

template <ForwardConfig kConfig>
struct Control {
  uint64_t slot_full[kConfig.slots], slot_empty[kConfig.slots];
  uint64_t query_full[kConsumers], query_empty[kConsumers];
  uint64_t item_full[kItemStages], item_empty[kItemStages];
  int2 slot_valid[kConfig.slots];  // valid tokens of the two halves in a slot
  WorkItem items[kItemStages];
};

// A position in a cyclic buffer and the parity of its barriers.
struct RingCursor {
  int32_t slot = 0;
  uint32_t parity = 0;

  // By fewer than `slots` places.
  __device__ void advance(int32_t slots, int32_t places = 1) {
    slot += places;
    if (slot >= slots) {
      slot -= slots;
      parity ^= 1;
    }
  }
  // By any number of places.
  __device__ void advance_far(int32_t slots, int32_t places) {
    const int32_t wraps = (slot + places) / slots;
    slot += places - wraps * slots;
    parity ^= wraps & 1;
  }
};

// The slots that one consumer and its producer go through. Those of a round are one for all
// consumers while they share loads, and then one for each consumer that still has steps, in turn;
// the keys of a round come before the values of the round before. The output of the tile follows.
template <ForwardConfig kConfig>
class SlotOrder {
 public:
  __device__ explicit SlotOrder(int32_t consumer) : second_(consumer == 1) {}

  __device__ void begin(const WorkItem& item) {
    if constexpr (kConfig.grain == Grain::kFine) {
      shared_ = item.shared;
      other_steps_ = item.halves_of(second_ ? 0 : 1).steps();
      const int32_t loads = 2 * (item.halves[0].steps() + item.halves[1].steps() - shared_);
      end_ = next_;
      end_.advance_far(kConfig.slots, loads);
    }
  }

  // The slot of the keys, or of the values, of a round in which this consumer has a step.
  __device__ RingCursor claim(int32_t round) {
    RingCursor slot = next_;
    if constexpr (kConfig.grain == Grain::kCoarse) {
      next_.advance(kConfig.slots);
    } else {
      const int32_t others = round >= shared_ && round < other_steps_ ? 1 : 0;
      slot.advance(kConfig.slots, second_ ? others : 0);
      next_.advance(kConfig.slots, 1 + others);
    }
    return slot;
  }

  // The slot of the values of this consumer's last round; the other's keys of the next round may
  // come before it.
  __device__ RingCursor claim_last(int32_t round) {
    if constexpr (kConfig.grain == Grain::kFine) {
      if (other_steps_ > round + 1) next_.advance(kConfig.slots);
    }
    return claim(round);
  }

  // The last slot of a tile, where its output is staged.
  __device__ RingCursor claim_output() {
    if constexpr (kConfig.grain == Grain::kFine) next_ = end_;
    const RingCursor slot = next_;
    next_.advance(kConfig.slots);
    return slot;
  }

 private:
  const bool second_;
  RingCursor next_, end_;
  int32_t shared_ = 0, other_steps_ = 0;
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
  __device__ char* slot(int32_t slot) const {
    return base_ + kConfig.ring_offset() + slot * kConfig.slot_bytes();
  }
  __device__ ControlBlock& control() const {
    return *reinterpret_cast<ControlBlock*>(base_ + kConfig.control_offset());
  }
  __device__ int2& slot_valid(int32_t slot) const { return control().slot_valid[slot]; }
  __device__ uint32_t slot_full(int32_t slot) const {
    return shared_address(&control().slot_full[slot]);
  }
  __device__ uint32_t slot_empty(int32_t slot) const {
    return shared_address(&control().slot_empty[slot]);
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
    for (int32_t at = 0; at < kConfig.slots; ++at) {
      barrier_init(slot_full(at), 1);
      barrier_init(slot_empty(at), kConsumers * kConsumerWarps);
    }
    for (int32_t consumer = 0; consumer < kConsumers; ++consumer) {
      barrier_init(query_full(consumer), 1);
      barrier_init(query_empty(consumer), kConsumerWarps);
    }
    for (int32_t stage = 0; stage < kItemStages; ++stage) {
      barrier_init(item_full(stage), 1);
      barrier_init(item_empty(stage), kConsumers * kConsumerWarps + kProducers<kConfig.grain>);
    }
    barrier_init_fence();
  }

 private:
  char* base_;
};

// Takes the work items in turn. Every warp of consumers and producers has its own queue object.
template <ForwardConfig kConfig>
class WorkQueue {
 public:
  __device__ explicit WorkQueue(const SharedMemory<kConfig>& shared) : shared_(shared) {}

  // By a whole warp. False when there is no more.
  __device__ bool next(WorkItem& item) {
    barrier_wait(shared_.item_full(cursor_.slot), cursor_.parity);
    item = shared_.control().items[cursor_.slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_.item_empty(cursor_.slot));
    cursor_.advance(kItemStages);
    return item.batch >= 0;
  }

 private:
  const SharedMemory<kConfig>& shared_;
  RingCursor cursor_;
};

// One tile of the launch as a work item; `next` counts the tiles of all heads.
template <Grain kGrain>
__device__ inline WorkItem make_item(const ForwardShape& shape, const Schedule& schedule,
                                     int32_t next) {
  WorkItem item;
  const int32_t list = next / schedule.tiles;
  item.batch = list / shape.problem.heads;
  item.head = list - item.batch * shape.problem.heads;
  int32_t tile = next - list * schedule.tiles;
  if (schedule.order != nullptr) {
    tile = schedule.order[list_of(schedule, item.batch, item.head) * schedule.tiles + tile];
  }
  item.rounds = 0;
#pragma unroll
  for (int32_t consumer = 0; consumer < kConsumers; ++consumer) {
    item.rows[consumer] = consumer_rows<kGrain>(shape, item.batch, tile, consumer);
    item.halves[consumer] =
        tile_halves<kGrain>(shape, schedule, item.batch, item.head, tile, consumer);
    item.rounds = max(item.rounds, item.halves[consumer].steps());
  }
  item.shared = kGrain == Grain::kCoarse ? item.rounds
                                         : tile_shared_steps(schedule, item.batch, item.head, tile,
                                                             item.halves[0], item.halves[1]);
  return item;
}

// The scheduling warp makes the work items, one or two tiles ahead of the others.
template <ForwardConfig kConfig>
__device__ void schedule_tiles(const ForwardArguments& arguments,
                               const SharedMemory<kConfig>& shared) {
  if (threadIdx.x % 32 != 0) return;
  const ForwardShape& shape = arguments.shape;
  const Schedule& schedule = arguments.schedule;
  const int32_t tiles = shape.problem.batch * shape.problem.heads * schedule.tiles;
  RingCursor cursor;
  for (int32_t turn = blockIdx.x;; turn += gridDim.x) {
    const int32_t next = schedule.ticket == nullptr ? turn : atomicAdd(schedule.ticket, 1);
    WorkItem item;
    item.batch = -1;
    if (next < tiles) item = make_item<kConfig.grain>(shape, schedule, next);
    barrier_wait(shared.item_empty(cursor.slot), cursor.parity ^ 1);
    shared.control().items[cursor.slot] = item;
    barrier_arrive(shared.item_full(cursor.slot));
    cursor.advance(kItemStages);
    if (next >= tiles) return;
  }
}

}  // namespace video_attn::hopper
