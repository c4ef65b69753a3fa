// The steps of rows of a forward launch as lists: plain C++ without a CUDA call, by the rules that
// the kernels follow (config.h, step_list.h).
#pragma once

#include <cstdint>
#include <vector>

#include "hopper/config.h"
#include "hopper/params.h"

namespace video_attn::hopper {

struct RowPlan {
  std::vector<KeyHalf> halves;  // in the order in which they are attended
  HalfCounts counts;
};

// The halves of a query row that sees the key blocks `blocks`.
RowPlan plan_row(const std::vector<int32_t>& blocks, const Side& kv_side);

struct PairPlan {
  std::vector<int32_t> rows[2];  // the lists in paired order
  int32_t shared_steps;          // of both rows, loaded once
};

// How the two rows of a fine tile share their loads; the lists ascend.
PairPlan plan_pair(const std::vector<int32_t>& first, const std::vector<int32_t>& second,
                   const Side& kv_side);

}  // namespace video_attn::hopper
