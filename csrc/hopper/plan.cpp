#include "hopper/plan.h"

#include <algorithm>

namespace video_attn::hopper {

ForwardPlan plan_forward(Grain grain, const Problem& problem, int32_t multiprocessors) {
  const int64_t heads = static_cast<int64_t>(problem.batch) * problem.heads;
  const int64_t tiles =
      heads * query_tiles(grain, problem.q_side.length, problem.q_side.block_size);
  const int64_t blocks = std::min<int64_t>(tiles, multiprocessors);
  return {forward_config(grain, problem.head_dim), tiles, static_cast<int32_t>(blocks)};
}

RowPlan plan_row(const std::vector<int32_t>& slots, const Side& kv_side) {
  const auto entry = [&](int32_t position) -> KeyEntry {
    const int32_t slot = slots.at(position);
    return {slot, valid_tokens(slot, kv_side.block_size, kv_side.length, kv_side.lens.data)};
  };
  RowPlan row{{}, {0, 0}};
  for (int32_t i = 0; i < static_cast<int32_t>(slots.size()); ++i) row.counts.add(entry(i).valid);
  HalfCursor cursor(entry, kv_side.block_size, row.counts);
  for (int32_t i = 0; i < row.counts.all; ++i) row.halves.push_back(cursor.next());
  return row;
}

}  // namespace video_attn::hopper
