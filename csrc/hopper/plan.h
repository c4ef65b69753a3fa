// How a forward launch is cut up, and the steps of a row: plain C++ without a CUDA call, from the
// numbers and the rules that the kernels use (config.h, step_list.h).
#pragma once

#include <cstdint>
#include <vector>

#include "hopper/config.h"
#include "hopper/params.h"

namespace video_attn::hopper {

struct ForwardPlan {
  ForwardConfig config;
  int64_t tiles;   // of all batches and heads
  int32_t blocks;  // of threads: each takes tiles until none is left
};

ForwardPlan plan_forward(Grain grain, const Problem& problem, int32_t multiprocessors);

struct RowPlan {
  std::vector<KeyHalf> halves;  // in the order in which they are attended
  HalfCounts counts;
};

// The halves of a query row that sees the key blocks `slots`.
RowPlan plan_row(const std::vector<int32_t>& slots, const Side& kv_side);

struct PairPlan {
  std::vector<int32_t> rows[2];  // the lists in paired order
  int32_t shared_steps;          // of both rows, loaded once
};

// How the two rows of a fine tile share their loads; the lists ascend.
PairPlan plan_pair(const std::vector<int32_t>& first, const std::vector<int32_t>& second,
                   const Side& kv_side);

}  // namespace video_attn::hopper
