// The producer warps: each walks the lists of key blocks of its ring and keeps the ring full.
#pragma once

#include "hopper/work.h"

namespace video_attn::hopper {

// The entries of one row, read by a warp 32 at a time: a lane holds one, and the indices of the
// next 32 are already on their way.
class WarpEntries {
 public:
  __device__ WarpEntries(const RowList& list, const Side& keys, const int32_t* lens)
      : list_(list), keys_(keys), lens_(lens) {
    following_ = index_at(threadIdx.x % 32);
  }

  // By a whole warp.
  __device__ KeyEntry operator()(int32_t position) {
    if (position / 32 != chunk_) load(position / 32);
    return {__shfl_sync(~0u, slot_, position % 32), __shfl_sync(~0u, valid_, position % 32)};
  }

 private:
  __device__ int32_t index_at(int32_t entry) const {
    if (entry >= list_.count) return 0;
    return list_.indices == nullptr ? entry : list_.indices[entry * list_.stride];
  }

  __device__ void load(int32_t chunk) {
    const int32_t lane = threadIdx.x % 32;
    slot_ = chunk == chunk_ + 1 ? following_ : index_at(chunk * 32 + lane);
    valid_ = valid_tokens(slot_, keys_.block_size, keys_.length, lens_);
    following_ = index_at((chunk + 1) * 32 + lane);
    chunk_ = chunk;
  }

  RowList list_;
  const Side& keys_;
  const int32_t* lens_;
  int32_t chunk_ = -1;
  int32_t slot_ = 0, valid_ = 0, following_ = 0;
};

struct Step {
  KeyHalf halves[2];  // a missing half has no valid token and no load
};

template <ForwardConfig kConfig>
class Producer {
 public:
  __device__ Producer(const ForwardArguments& arguments, const SharedMemory<kConfig>& shared,
                      int32_t ring)
      : arguments_(arguments), shared_(shared), ring_(ring), queue_(shared, ring) {}

  __device__ void run() {
    WorkItem item;
    while (queue_.next(item)) {
      load_queries(item);
      if (item.halves.all > 0) load_steps(item);
    }
  }

 private:
  static constexpr int32_t kColumns = 64;  // channels of one box
  static constexpr int32_t kColumnBoxes = kConfig.head_dim / kColumns;
  static constexpr int32_t kReaders = kConsumers / kConfig.rings;

  // Keys run one step ahead of values, as the consumers take them.
  __device__ void load_steps(const WorkItem& item) {
    const Problem& problem = arguments_.shape.problem;
    const int32_t kv_head = item.head / (problem.heads / problem.kv_heads);
    const RowList list = row_list(arguments_.shape, item.batch, item.head, item.rows.row);
    const int32_t* lens = batch_lens(problem.kv_side.lens, item.batch);
    HalfCursor<WarpEntries> cursor(WarpEntries(list, problem.kv_side, lens),
                                   problem.kv_side.block_size, item.halves);
    int32_t left = item.halves.all;
    Step step = next_step(cursor, left);
    load_operand(arguments_.k, step, kv_head, item.batch);
    while (left > 0) {
      const Step following = next_step(cursor, left);
      load_operand(arguments_.k, following, kv_head, item.batch);
      load_operand(arguments_.v, step, kv_head, item.batch);
      step = following;
    }
    load_operand(arguments_.v, step, kv_head, item.batch);
  }

  __device__ static Step next_step(HalfCursor<WarpEntries>& cursor, int32_t& left) {
    Step step{};
    step.halves[0] = cursor.next();
    if (left > 1) step.halves[1] = cursor.next();
    left -= 2;
    return step;
  }

  __device__ void load_queries(const WorkItem& item) {
#pragma unroll
    for (int32_t reader = 0; reader < kReaders; ++reader) {
      const int32_t consumer = ring_ + reader;
      barrier_wait(shared_.query_empty(consumer), query_parity_ ^ 1);
      if (threadIdx.x % 32 == 0) {
        const uint32_t full = shared_.query_full(consumer);
        barrier_arrive_expect(full, kConfig.query_bytes());
#pragma unroll
        for (int32_t box = 0; box < kColumnBoxes; ++box) {
          load_box(&arguments_.q,
                   shared_address(shared_.query(consumer)) + box * kConsumerTokens * kColumns * 2,
                   full, box * kColumns, item.rows.query + reader * kConsumerTokens, item.head,
                   item.batch);
        }
      }
    }
    query_parity_ ^= 1;
  }

  // Keys or values of one step, into the next slot.
  __device__ void load_operand(const CUtensorMap& map, const Step& step, int32_t head,
                               int32_t batch) {
    barrier_wait(shared_.slot_empty(ring_, cursor_.slot), cursor_.parity ^ 1);
    if (threadIdx.x % 32 == 0) {
      const uint32_t full = shared_.slot_full(ring_, cursor_.slot);
      const uint32_t slot = shared_address(shared_.slot(ring_, cursor_.slot));
      shared_.slot_valid(ring_, cursor_.slot) =
          make_int2(step.halves[0].valid, step.halves[1].valid);
      barrier_arrive_expect(
          full, step.halves[1].valid > 0 ? kConfig.slot_bytes() : kConfig.slot_bytes() / 2);
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        if (step.halves[half].valid == 0) continue;
#pragma unroll
        for (int32_t box = 0; box < kColumnBoxes; ++box) {
          const int32_t row = box * kStepTokens + half * kHalfTokens;
          load_box(&map, slot + row * kColumns * 2, full, box * kColumns, step.halves[half].token,
                   head, batch);
        }
      }
    }
    cursor_.advance(kConfig.slots);
  }

  const ForwardArguments& arguments_;
  const SharedMemory<kConfig>& shared_;
  int32_t ring_;
  WorkQueue<kConfig> queue_;
  RingCursor cursor_;
  uint32_t query_parity_ = 0;
};

}  // namespace video_attn::hopper
