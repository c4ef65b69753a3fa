// The producer warps: walk the lists of key blocks and keep the ring of operands full.
#pragma once

#include "hopper/warp_entries.h"
#include "hopper/work.h"

namespace video_attn::hopper {

struct Step {
  KeyHalf halves[2];  // a missing half has no valid token and no load
};

// The steps of one row.
class StepCursor {
 public:
  __device__ StepCursor(const WarpEntries& entries, int32_t block_size, HalfCounts counts)
      : cursor_(entries, block_size, counts), left_(counts.all) {}

  __device__ Step next() {
    Step step{};
    step.halves[0] = cursor_.next();
    if (left_ > 1) step.halves[1] = cursor_.next();
    left_ -= 2;
    return step;
  }

 private:
  HalfCursor<WarpEntries> cursor_;
  int32_t left_;
};

// Producer `list` of a block of threads. Of the loads that consumers share, the first does all.
template <ForwardConfig kConfig>
class Producer {
 public:
  __device__ Producer(const ForwardArguments& arguments, const SharedMemory<kConfig>& shared,
                      int32_t list)
      : arguments_(arguments), shared_(shared), list_(list), queue_(shared), order_(list) {}

  __device__ void run() {
    WorkItem item;
    while (queue_.next(item)) {
      const HalfCounts halves = item.halves_of(list_);
      order_.begin(item);
      if (halves.all > 0) {
        load_steps(item, halves);
      } else {
        load_queries(item);
      }
      for (int32_t turn = turns_of(halves.steps()); turn < turns_of(item.rounds); ++turn) {
        begin_round();
      }
      begin_round();
      offer_output();
    }
  }

 private:
  static constexpr int32_t kColumns = 64;  // channels of one box
  static constexpr int32_t kColumnBoxes = kConfig.head_dim / kColumns;

  // Producers go from round to round together. So whoever waits for a stage knows that its last use
  // has begun, and the parity of its barrier tells whether that use has ended. (They wait at
  // different places in the code: a named barrier would do, but synccheck takes that for an error.)
  __device__ void begin_round() {
    if constexpr (kProducers<kConfig.grain> > 1) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(shared_.round());
      barrier_wait_together(shared_.round(), parities_ >> 1 & 1);
      parities_ ^= 2;
    }
  }

  // Keys run one step ahead of values, as the consumers take them.
  __device__ void load_steps(const WorkItem& item, const HalfCounts& halves) {
    const Problem& problem = arguments_.shape.problem;
    const Side& keys = problem.kv_side;
    const RowList list = planned_list(arguments_.shape, arguments_.schedule, item.batch, item.head,
                                      item.rows_of(list_).row);
    StepCursor cursor(WarpEntries(list, keys, keys.lens.of(item.batch)), keys.block_size, halves);
    const int32_t kv_head = item.head / (problem.heads / problem.kv_heads);
    const auto load = [&](const CUtensorMap& map, const Step& step, int32_t round,
                          const RingPlace<kConfig.stages>& stage) {
      const bool shared = kConfig.grain == Grain::kCoarse || round < item.shared;
      if (!shared || list_ == 0) load_operand(map, step, stage, shared, kv_head, item.batch);
    };
    Step step = cursor.next();
    begin_round();
    load(arguments_.k, step, 0, order_.claim(0));
    load_queries(item);  // when the consumers are done with the tile before
    const int32_t last = halves.steps() - 1;
    for (int32_t round = 1; round <= last; ++round) {
      const Step following = cursor.next();
      begin_round();
      load(arguments_.k, following, round, order_.claim(round));
      load(arguments_.v, step, round - 1, order_.claim(round - 1));
      step = following;
    }
    begin_round();
    load(arguments_.v, step, last, order_.claim_last(last));
  }

  // Hands the consumers an empty stage for the output of the tile.
  __device__ void offer_output() {
    const auto stage = order_.claim_output();
    if (list_ != 0) return;
    barrier_wait_together(shared_.stage_empty(stage.stage), stage.parity ^ 1);
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_.stage_full(stage.stage));
  }

  __device__ void load_queries(const WorkItem& item) {
#pragma unroll
    for (int32_t consumer = 0; consumer < kConsumers; ++consumer) {
      if (kConfig.grain == Grain::kFine && consumer != list_) continue;
      barrier_wait_together(shared_.query_empty(consumer), (parities_ & 1) ^ 1);
      if (threadIdx.x % 32 == 0) {
        MemoryBarrier* full = shared_.query_full(consumer);
        uint8_t* queries = shared_.query(consumer);
        barrier_arrive_expecting(full, kConfig.query_bytes());
#pragma unroll
        for (int32_t box = 0; box < kColumnBoxes; ++box) {
          load_box(&arguments_.q, queries + box * kConsumerTokens * kColumns * 2, full,
                   box * kColumns, item.rows[consumer].query, item.head, item.batch);
        }
      }
    }
    parities_ ^= 1;
  }

  // Keys or values of one step, into a stage.
  __device__ void load_operand(const CUtensorMap& map, const Step& step,
                               const RingPlace<kConfig.stages>& stage, bool shared, int32_t head,
                               int32_t batch) {
    MemoryBarrier* empty = shared_.stage_empty(stage.stage);
    barrier_wait_together(empty, stage.parity ^ 1);
    const int32_t lane = threadIdx.x % 32;
    if (!shared && lane < kConsumerWarps) barrier_arrive(empty);  // for who needs it not
    if (lane == 0) start_copies(map, step, stage, head, batch);
    __syncwarp();
  }

  __device__ void start_copies(const CUtensorMap& map, const Step& step,
                               const RingPlace<kConfig.stages>& stage, int32_t head,
                               int32_t batch) {
    MemoryBarrier* full = shared_.stage_full(stage.stage);
    uint8_t* destination = shared_.stage(stage.stage);
    const bool whole = step.halves[1].valid > 0;
    shared_.stage_valid(stage.stage) = make_int2(step.halves[0].valid, step.halves[1].valid);
    barrier_arrive_expecting(full, whole ? kConfig.stage_bytes() : kConfig.stage_bytes() / 2);
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      if (step.halves[half].valid == 0) continue;
#pragma unroll
      for (int32_t box = 0; box < kColumnBoxes; ++box) {
        const int32_t row = box * kStepTokens + half * kUnit;
        load_box(&map, destination + row * kColumns * 2, full, box * kColumns,
                 step.halves[half].token, head, batch);
      }
    }
  }

  const ForwardArguments& arguments_;
  const SharedMemory<kConfig>& shared_;
  const int32_t list_;
  WorkQueue<kConfig> queue_;
  StageOrder<kConfig> order_;
  uint32_t parities_ = 0;  // bit 0: of the queries' barriers; bit 1: of the rounds'
};

}  // namespace video_attn::hopper
