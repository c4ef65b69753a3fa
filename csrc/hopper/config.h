// Tile shapes of the forward kernels and what they take of an SM. Plain C++: the kernels, the
// launchers and the host planning read the same numbers.
#pragma once

#include <cstdint>

#include "hopper/params.h"
#include "hopper/step_list.h"

namespace video_attn::hopper {

enum class Grain : int32_t {
  kCoarse,  // the consumers of a tile share one list of key blocks, and each load of keys
  kFine     // every consumer has the list of its own 64 query rows; what both see is loaded once
};

constexpr int32_t kSharedBytesPerBlock = 232448;  // what one block of threads can have on sm_90
constexpr int32_t kControlBytes = 1024;           // barriers, work items, lengths of partial halves
constexpr int32_t kConsumers = 2;                 // warpgroups of 64 query rows each
constexpr int32_t kConsumerTokens = 64;
constexpr int32_t kTileTokens = kConsumers * kConsumerTokens;
constexpr int32_t kConsumerThreads = 128 * kConsumers;
constexpr int32_t kForwardThreads = kConsumerThreads + 128;  // and the producer warpgroup

// Registers of a thread after the warpgroups have shared out the 168 that each is launched with.
constexpr int32_t kConsumerRegisters = 224;
constexpr int32_t kProducerRegisters = 56;

struct ForwardConfig {
  Grain grain;
  int32_t head_dim;  // channels in shared memory, 64 or 128; missing ones are zero
  int32_t stages;    // of the ring; each holds the keys or the values of a step, or a tile's output

  constexpr int32_t query_bytes() const { return kConsumerTokens * head_dim * 2; }
  constexpr int32_t stage_bytes() const { return kStepTokens * head_dim * 2; }
  constexpr int32_t ring_offset() const { return kConsumers * query_bytes(); }
  constexpr int32_t control_offset() const { return ring_offset() + stages * stage_bytes(); }
  constexpr int32_t shared_bytes() const { return control_offset() + kControlBytes; }
};

constexpr int32_t padded_head_dim(int32_t head_dim) { return head_dim <= 64 ? 64 : 128; }

// A consumer holds the keys of one step and the values of the one before. Consumers that share each
// load need two stages for that, consumers on their own four; the rest is loaded ahead.
constexpr ForwardConfig forward_config(Grain grain, int32_t head_dim) {
  const int32_t channels = padded_head_dim(head_dim);
  return {grain, channels, channels == 64 ? 12 : 6};
}

static_assert(forward_config(Grain::kCoarse, 128).shared_bytes() <= kSharedBytesPerBlock);
static_assert(forward_config(Grain::kFine, 128).shared_bytes() <= kSharedBytesPerBlock);
static_assert(forward_config(Grain::kCoarse, 64).shared_bytes() <= kSharedBytesPerBlock);
static_assert(forward_config(Grain::kFine, 64).shared_bytes() <= kSharedBytesPerBlock);

// Query tiles of one head.
constexpr int32_t query_tiles(Grain grain, int32_t length, int32_t block_size) {
  if (grain == Grain::kFine) return divide_up(length, kTileTokens);
  return divide_up(length, block_size) * divide_up(block_size, kTileTokens);
}

// Dense launches of so many steps for each block of threads (0.5 to 0.9 ms) draw their tiles:
// memory for the ticket costs a few microseconds.
constexpr int64_t kDrawingSteps = 512;

// A forward launch: blocks of threads take tiles until none is left.
struct ForwardPlan {
  ForwardConfig config;
  int64_t tiles;   // of all batches and heads
  int32_t blocks;  // of threads
  bool draws_dense_tiles;
};

constexpr ForwardPlan plan_forward(Grain grain, const Problem& problem, int32_t multiprocessors) {
  const Side& queries = problem.q_side;
  const int64_t tiles = static_cast<int64_t>(problem.batch) * problem.heads *
                        query_tiles(grain, queries.length, queries.block_size);
  const int64_t blocks = tiles < multiprocessors ? tiles : multiprocessors;
  const int64_t steps = tiles * divide_up(problem.kv_side.length, kStepTokens);
  return {forward_config(grain, problem.head_dim), tiles, static_cast<int32_t>(blocks),
          tiles > blocks && steps >= kDrawingSteps * blocks};
}

}  // namespace video_attn::hopper
