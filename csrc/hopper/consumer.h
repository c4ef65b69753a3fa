// The consumer warpgroups: scores, softmax and output of 64 query rows each.
//
// A step's scores are issued before the product with the values of the step before, so that this
// product runs beside the softmax. The consumers take turns at issuing: while one computes its
// softmax, the tensor cores work for the other.
#pragma once

#include "hopper/softmax.h"
#include "hopper/work.h"

namespace video_attn::hopper {

// Before a product of a warpgroup: what it reads and adds to is in its registers. (That of
// ThunderKittens also orders shared memory, which the main loop need not wait for.)
template <class Accumulator>
__device__ inline void product_fence(Accumulator& accumulator) {
  settle(accumulator);
  wgmma_fence();
}

template <ForwardConfig kConfig, class Element>
class Consumer {
 public:
  __device__ Consumer(const ForwardArguments& arguments, const SharedMemory<kConfig>& shared,
                      int32_t consumer)
      : arguments_(arguments),
        shared_(shared),
        consumer_(consumer),
        scale_(fmaxf(arguments.shape.problem.scale, kLeastScale) * kLog2E),
        queue_(shared),
        order_(consumer) {
    if (consumer == kConsumers - 1) pass_turn();  // the first consumer begins
  }

  __device__ void run() {
    WorkItem item;
    while (queue_.next(item)) {
      Output output;
      kittens::warp::zero(output);
      Softmax softmax(scale_);
      barrier_wait(shared_.query_full(consumer_), query_parity_);
      query_parity_ ^= 1;
      order_.begin(item);
      if (item.halves_of(consumer_).all > 0) attend(item, softmax, output);
      free_output();
      skip_turns(item);
      finish(item, softmax, output);
    }
    free_output();
    // The others' turns all come before one of this consumer, which is the last to be passed.
    if (consumer_ == 0) take_turn();
  }

 private:
  static constexpr float kLog2E = 1.4426950408889634f;
  static constexpr float kLeastScale = 1e-30f;  // keeps a masked score of a zero scale masked
  static constexpr int32_t kColumns = 64;
  static constexpr int32_t kColumnBoxes = kConfig.head_dim / kColumns;
  static constexpr bool kSharesLoads = kConfig.grain == Grain::kCoarse;

  using Place = RingPlace<kConfig.stages>;
  using Warpgroup = kittens::group<4>;
  using Queries = kittens::st<Element, kConsumerTokens, kConfig.head_dim>;
  using Operand = kittens::st<Element, kStepTokens, kConfig.head_dim>;
  using Weights = kittens::rt<Element, 16, kStepTokens>;
  using Output = kittens::rt_fl<16, kConfig.head_dim>;

  __device__ void take_turn() const { threads_sync<kConsumerThreads>(kTurnBarrier + consumer_); }
  __device__ void pass_turn() const {
    threads_arrive<kConsumerThreads>(kTurnBarrier + (consumer_ + 1) % kConsumers);
  }

  // Every consumer has as many turns in a tile as the one with the most steps.
  __device__ void skip_turns(const WorkItem& item) const {
    if constexpr (kConfig.grain == Grain::kFine) {
      const int32_t taken = turns_of(item.halves_of(consumer_).steps());
      for (int32_t turn = taken; turn < turns_of(item.rounds); ++turn) {
        take_turn();
        pass_turn();
      }
    }
  }

  __device__ Operand& operand(const Place& place) const {
    return *reinterpret_cast<Operand*>(shared_.stage(place.stage));
  }
  __device__ void wait_stage(const Place& place) const {
    barrier_wait(shared_.stage_full(place.stage), place.parity);
  }
  __device__ void release_stage(const Place& place) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_.stage_empty(place.stage));
  }

  __device__ void attend(const WorkItem& item, Softmax& softmax, Output& output) {
    Scores scores;
    Weights weights;
    const HalfCounts halves = item.halves_of(consumer_);
    const int32_t steps = halves.steps();
    const int32_t full_steps = halves.full_steps();

    const Place keys = order_.claim(0);
    wait_stage(keys);
    take_turn();
    issue_scores(scores, keys);
    pass_turn();
    free_output();
    Warpgroup::mma_async_wait<0>();
    if (full_steps == 0) mend_scores(scores, keys);
    release_stage(keys);
    softmax.first(scores);
    kittens::warp::copy(weights, scores);

    int32_t step = 1;
    for (; step < full_steps; ++step) attend_step<false>(step, softmax, scores, weights, output);
    for (; step < steps; ++step) attend_step<true>(step, softmax, scores, weights, output);
    release_queries();

    const Place values = order_.claim_last(steps - 1);
    wait_stage(values);
    if (steps > full_steps) clear_values(values);
    take_turn();
    issue_output(output, weights, values);
    pass_turn();
    Warpgroup::mma_async_wait<0>();
    release_stage(values);
  }

  // The scores and weights of a step, and the output of the step before.
  template <bool kPartial>
  __device__ void attend_step(int32_t step, Softmax& softmax, Scores& scores, Weights& weights,
                              Output& output) {
    // Full steps take the maximum so far; the sum of the weights tells whether it had to grow.
    constexpr bool kGuesses = !kPartial;
    const Place keys = order_.claim(step);
    const Place values = order_.claim(step - 1);
    wait_stage(keys);
    // Before the turn: behind the products of the scores the barrier's answer would come late.
    // Where consumers load on their own, values are the last to arrive, and scores do not wait for
    // them.
    if constexpr (kPartial || kSharesLoads) wait_stage(values);
    if constexpr (kPartial) clear_values(values);
    take_turn();
    issue_scores(scores, keys);
    if constexpr (!kSharesLoads) wait_stage(values);
    issue_output(output, weights, values);
    pass_turn();
    Warpgroup::mma_async_wait<1>();
    bool mended;  // the output so far must be rescaled; the whole warp knows it
    if constexpr (kGuesses) {
      exponentiate(softmax, scores);
      mended = softmax.exceeds(kLargeSum);
    } else {
      mend_scores(scores, keys);
      mended = softmax.follow(scores);
      exponentiate(softmax, scores);
    }
    if (!kGuesses || !mended) release_stage(keys);
    // This has happened above. Without it the compiler lets the exponentials wait for the output.
    wait_stage(values);
    Warpgroup::mma_async_wait<0>();
    release_stage(values);
    if (mended) [[unlikely]] {
      if constexpr (kGuesses) {
        mend_weights(scores, keys, softmax);
        release_stage(keys);
      }
      softmax.rescale(output);
    }
    softmax.accept();
    kittens::warp::copy(weights, scores);
  }

  __device__ static void exponentiate(Softmax& softmax, Scores& scores) {
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) softmax.exponentiate(scores, row);
  }

  // Weights whose maximum had to grow.
  __device__ void mend_weights(Scores& weights, const Place& keys, Softmax& softmax) const {
    if (softmax.exceeds(kLostSum)) {
      repeat_scores(weights, keys);
      softmax.follow(weights);
      exponentiate(softmax, weights);
    } else {
      softmax.shrink(weights);
    }
  }

  // The scores of this thread once more, without tensor cores: by one warp, and hardly ever.
  __device__ void repeat_scores(Scores& scores, const Place& keys) const {
    const auto& queries = *reinterpret_cast<const Queries*>(shared_.query(consumer_));
    const Operand& held = operand(keys);
    const int32_t lane = threadIdx.x % 32;
    const int32_t first_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    kittens::warp::zero(scores);
#pragma unroll
    for (int32_t column = 0; column < Scores::width; ++column) {
#pragma unroll 1
      for (int32_t channel = 0; channel < kConfig.head_dim; channel += 2) {
#pragma unroll
        for (int32_t part = 0; part < 4; ++part) {
          const float2 row = pair_at(queries, first_row + part % 2 * 8, channel);
          const int32_t key = column * 16 + part / 2 * 8 + lane % 4 * 2;
          const float2 first = pair_at(held, key, channel),
                       second = pair_at(held, key + 1, channel);
          float2& pair = scores.tiles[0][column].data[part];
          pair.x += row.x * first.x + row.y * first.y;
          pair.y += row.x * second.x + row.y * second.y;
        }
      }
    }
  }

  // Two neighbouring channels of a tile in shared memory.
  template <class Tile>
  __device__ static float2 pair_at(const Tile& tile, int32_t row, int32_t channel) {
    using Pair = typename kittens::base_types::packing<Element>::packed_type;
    const auto& pair = *reinterpret_cast<const Pair*>(&tile[int2{row, channel}]);
    return kittens::base_types::convertor<float2, Pair>::convert(pair);
  }

  __device__ void issue_scores(Scores& scores, const Place& keys) const {
    auto& queries = *reinterpret_cast<Queries*>(shared_.query(consumer_));
    product_fence(scores);
    Warpgroup::mma_ABt<Scores, Queries, Operand, 0, 0>(scores, queries, operand(keys));
  }

  __device__ void issue_output(Output& output, const Weights& weights, const Place& values) const {
    product_fence(output);
    Warpgroup::mma_AB<Output, Weights, Operand, 0, 1>(output, weights, operand(values));
  }

  __device__ void mend_scores(Scores& scores, const Place& keys) const {
    const int2 valid = shared_.stage_valid(keys.stage);
    __syncwarp();  // all lanes have read it before one releases the stage
    mask_scores(scores, valid.x, valid.y);
  }

  // Values of keys that do not count become zero: their weights are zero, but whatever lies there
  // need not be a number. By the whole warpgroup.
  __device__ void clear_values(const Place& place) const {
    const int2 valid = shared_.stage_valid(place.stage);
    uint8_t* stage = shared_.stage(place.stage);
    constexpr int32_t kRowVectors = kColumns * 2 / static_cast<int32_t>(sizeof(int4));
    for (int32_t at = threadIdx.x % 128; at < kStepTokens * kRowVectors; at += 128) {
      const int32_t row = at / kRowVectors;
      const bool counts = row < kUnit ? row < valid.x : row - kUnit < valid.y;
      if (counts) continue;
      for (int32_t box = 0; box < kColumnBoxes; ++box) {
        reinterpret_cast<int4*>(stage)[box * kStepTokens * kRowVectors + at] = int4{0, 0, 0, 0};
      }
    }
    shared_write_fence();
    threads_sync<128>(kConsumerBarrier + consumer_);
  }

  __device__ void release_queries() const {
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_.query_empty(consumer_));
  }

  __device__ void finish(const WorkItem& item, const Softmax& softmax, Output& output) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t first_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const bool seen = item.halves_of(consumer_).all > 0;
    const ConsumerRows rows = item.rows_of(consumer_);
    float* lse = arguments_.lse +
                 (static_cast<int64_t>(item.batch) * arguments_.shape.problem.heads + item.head) *
                     arguments_.shape.problem.q_side.length +
                 rows.query;
#pragma unroll
    for (int32_t part = 0; part < kRowsPerThread; ++part) {
      const int32_t row = first_row + part * 8;
      const bool valid = seen && row < rows.valid;
      const float total = softmax.total(part);
      const float factor = 1.0f / total;
      for_each_pair(output, part, [&](float2& pair) {
        pair.x = valid ? pair.x * factor : 0.0f;
        pair.y = valid ? pair.y * factor : 0.0f;
      });
      if (lane % 4 == 0 && row < rows.stored) {
        lse[row] = valid ? softmax.log_sum(part, total) : -INFINITY;
      }
    }
    store_output(item, rows, output);
  }

  // Through the last stage of the tile. The copy to memory is under way when this returns.
  __device__ void store_output(const WorkItem& item, const ConsumerRows& rows,
                               const Output& output) {
    const Place stage = order_.claim_output();
    wait_stage(stage);
    uint8_t* staged = shared_.stage(stage.stage) + consumer_ * kConfig.query_bytes();
    Warpgroup::store(*reinterpret_cast<Queries*>(staged), output);
    shared_write_fence();
    threads_sync<128>(kConsumerBarrier + consumer_);
    if (item.halves_of(consumer_).all == 0) release_queries();  // else attend() has done it
    if (threadIdx.x % 128 != 0) return;
    if (rows.stored > 0) {
      for (int32_t box = 0; box < kColumnBoxes; ++box) {
        store_box(&arguments_.out, staged + box * kConsumerTokens * kColumns * 2, box * kColumns,
                  rows.query, item.head, item.batch);
      }
      store_commit();
    }
    output_stage_ = stage.stage;
  }

  // Gives back the stage of the last output as soon as it has been copied, for the whole warpgroup.
  __device__ void free_output() {
    if (output_stage_ < 0) return;
    store_wait_read<0>();
    for (int32_t warp = 0; warp < kConsumerWarps; ++warp) {
      barrier_arrive(shared_.stage_empty(output_stage_));
    }
    output_stage_ = -1;
  }

  const ForwardArguments& arguments_;
  const SharedMemory<kConfig>& shared_;
  const int32_t consumer_;
  const float scale_;
  WorkQueue<kConfig> queue_;
  StageOrder<kConfig> order_;
  int32_t output_stage_ = -1;  // still in use for output; known to the first thread only
  uint32_t query_parity_ = 0;
};

}  // namespace video_attn::hopper
