// What the warps of a block of threads share: the layout of shared memory, the order in which
// operands pass through its ring, and the work items that the scheduling warp hands to all others.
#pragma once

#include "device/ring.h"
#include "hopper/primitives.h"
#include "hopper/schedule.h"

namespace video_attn::hopper {

struct ForwardArguments {
  CUtensorMap q, k, v, out;
  ForwardShape shape;
  Schedule schedule;
  float* lse;
};

enum NamedBarrier : int32_t {
  kTurnBarrier = 1,                             // + consumer
  kConsumerBarrier = kTurnBarrier + kConsumers  // + consumer
};

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
  MemoryBarrier stage_full[kConfig.stages], stage_empty[kConfig.stages];
  MemoryBarrier query_full[kConsumers], query_empty[kConsumers];
  MemoryBarrier item_full[kItemStages], item_empty[kItemStages];
  int2 stage_valid[kConfig.stages];  // valid tokens of the two halves in a stage
  WorkItem items[kItemStages];
  MemoryBarrier round;  // of several producers, which begin each round together
};

// The stages that one consumer and its producer go through. Those of a round are one for all
// consumers while they share loads, and then one for each consumer that still has steps, in turn;
// the keys of a round come before the values of the round before. The output of the tile follows.
template <ForwardConfig kConfig>
class StageOrder {
 public:
  using Place = RingPlace<kConfig.stages>;

  __device__ explicit StageOrder(int32_t consumer) : second_(consumer == 1) {}

  __device__ void begin(const WorkItem& item) {
    if constexpr (kConfig.grain == Grain::kFine) {
      shared_ = item.shared;
      other_steps_ = item.halves_of(second_ ? 0 : 1).steps();
      const int32_t loads = 2 * (item.halves[0].steps() + item.halves[1].steps() - shared_);
      end_ = next_;
      end_.advance_far(loads);
    }
  }

  // The stage of the keys, or of the values, of a round in which this consumer has a step.
  __device__ Place claim(int32_t round) {
    Place stage = next_;
    if constexpr (kConfig.grain == Grain::kCoarse) {
      next_.advance();
    } else {
      const int32_t others = round >= shared_ && round < other_steps_ ? 1 : 0;
      stage.advance_by(second_ ? others : 0);
      next_.advance_by(1 + others);
    }
    return stage;
  }

  // The stage of the values of this consumer's last round; the other's keys of the next round may
  // come before it.
  __device__ Place claim_last(int32_t round) {
    if constexpr (kConfig.grain == Grain::kFine) {
      if (other_steps_ > round + 1) next_.advance();
    }
    return claim(round);
  }

  // The last stage of a tile, where its output is staged.
  __device__ Place claim_output() {
    if constexpr (kConfig.grain == Grain::kFine) next_ = end_;
    const Place stage = next_;
    next_.advance();
    return stage;
  }

 private:
  const bool second_;
  Place next_, end_;
  int32_t shared_ = 0, other_steps_ = 0;
};

// Shared memory of a block of threads, as the configuration lays it out.
template <ForwardConfig kConfig>
class SharedMemory {
 public:
  using ControlBlock = Control<kConfig>;
  static_assert(sizeof(ControlBlock) <= kControlBytes, "the control block outgrew its space");

  __device__ explicit SharedMemory(uint8_t* base) : base_(base) {}

  __device__ uint8_t* query(int32_t consumer) const {
    return base_ + consumer * kConfig.query_bytes();
  }
  __device__ uint8_t* stage(int32_t stage) const {
    return base_ + kConfig.ring_offset() + stage * kConfig.stage_bytes();
  }
  __device__ ControlBlock& control() const {
    return *reinterpret_cast<ControlBlock*>(base_ + kConfig.control_offset());
  }
  __device__ int2& stage_valid(int32_t stage) const { return control().stage_valid[stage]; }
  __device__ MemoryBarrier* stage_full(int32_t stage) const { return &control().stage_full[stage]; }
  __device__ MemoryBarrier* stage_empty(int32_t stage) const {
    return &control().stage_empty[stage];
  }
  __device__ MemoryBarrier* query_full(int32_t consumer) const {
    return &control().query_full[consumer];
  }
  __device__ MemoryBarrier* query_empty(int32_t consumer) const {
    return &control().query_empty[consumer];
  }
  __device__ MemoryBarrier* item_full(int32_t stage) const { return &control().item_full[stage]; }
  __device__ MemoryBarrier* item_empty(int32_t stage) const { return &control().item_empty[stage]; }

  __device__ MemoryBarrier* round() const { return &control().round; }

  // By one thread, before the barrier of the whole block. Warps arrive as one.
  __device__ void init_barriers() const {
    for (int32_t at = 0; at < kConfig.stages; ++at) {
      barrier_init(stage_full(at), 1);
      barrier_init(stage_empty(at), kConsumers * kConsumerWarps);
    }
    for (int32_t consumer = 0; consumer < kConsumers; ++consumer) {
      barrier_init(query_full(consumer), 1);
      barrier_init(query_empty(consumer), kConsumerWarps);
    }
    for (int32_t stage = 0; stage < kItemStages; ++stage) {
      barrier_init(item_full(stage), 1);
      barrier_init(item_empty(stage), kConsumers * kConsumerWarps + kProducers<kConfig.grain>);
    }
    if constexpr (kProducers<kConfig.grain> > 1) barrier_init(round(), kProducers<kConfig.grain>);
    barrier_publish();
  }

 private:
  uint8_t* base_;
};

// Takes the work items in turn. Every warp of consumers and producers has its own queue object.
template <ForwardConfig kConfig>
class WorkQueue {
 public:
  __device__ explicit WorkQueue(const SharedMemory<kConfig>& shared) : shared_(shared) {}

  // By a whole warp. False when there is no more.
  __device__ bool next(WorkItem& item) {
    barrier_wait(shared_.item_full(place_.stage), place_.parity);
    item = shared_.control().items[place_.stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_.item_empty(place_.stage));
    place_.advance();
    return item.batch >= 0;
  }

 private:
  const SharedMemory<kConfig>& shared_;
  RingPlace<kItemStages> place_;
};

// A warp finds how many tiles of every head run before all others.
__device__ inline int32_t tiles_that_lead(const Schedule& schedule) {
  if (schedule.leading == nullptr) return 0;
  int32_t most = 0;
  for (int32_t list = threadIdx.x % 32; list < schedule.batches * schedule.heads; list += 32) {
    most = max(most, schedule.leading[list]);
  }
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    most = max(most, __shfl_xor_sync(~0u, most, distance));
  }
  return most;
}

// One tile of the launch as a work item; `next` counts the tiles of all heads, of which the first
// `leading` of each come before the rest of each.
template <Grain kGrain>
__device__ inline WorkItem make_item(const ForwardShape& shape, const Schedule& schedule,
                                     int32_t leading, int32_t next) {
  WorkItem item;
  const int32_t before = shape.problem.batch * shape.problem.heads * leading;
  const int32_t skipped = next < before ? 0 : leading;
  const int32_t run = next < before ? leading : schedule.tiles - leading;
  const int32_t at = next < before ? next : next - before;
  const int32_t list = at / run;
  item.batch = list / shape.problem.heads;
  item.head = list - item.batch * shape.problem.heads;
  int32_t tile = skipped + at - list * run;
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
  const ForwardShape& shape = arguments.shape;
  const Schedule& schedule = arguments.schedule;
  const int32_t leading = tiles_that_lead(schedule);
  if (threadIdx.x % 32 != 0) return;
  const int32_t tiles = shape.problem.batch * shape.problem.heads * schedule.tiles;
  RingPlace<kItemStages> place;
  for (int32_t turn = blockIdx.x;; turn += gridDim.x) {
    const int32_t next = schedule.ticket == nullptr ? turn : atomicAdd(schedule.ticket, 1);
    WorkItem item;
    item.batch = -1;
    if (next < tiles) item = make_item<kConfig.grain>(shape, schedule, leading, next);
    barrier_wait(shared.item_empty(place.stage), place.parity ^ 1);
    shared.control().items[place.stage] = item;
    barrier_arrive(shared.item_full(place.stage));
    place.advance();
    if (next >= tiles) return;
  }
}

}  // namespace video_attn::hopper
