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

PairPlan plan_pair(const std::vector<int32_t>& first, const std::vector<int32_t>& second,
                   const Side& kv_side) {
  PairPlan pair{{first, second}, 0};
  int32_t common_count = 0;
  for (int row = 0; row < 2; ++row) {
    const std::vector<int32_t>& own = row == 0 ? first : second;
    const std::vector<int32_t>& other = row == 0 ? second : first;
    common_count = 0;
    for (int32_t i = 0; i < static_cast<int32_t>(own.size()); ++i) {
      const int32_t valid =
          valid_tokens(own[i], kv_side.block_size, kv_side.length, kv_side.lens.data);
      const bool common = valid == kHalfTokens &&
                          holds_slot(other.data(), 1, static_cast<int32_t>(other.size()), own[i]);
      const int32_t place =
          paired_place(common, common_count, i - common_count, static_cast<int32_t>(own.size()));
      pair.rows[row].at(place) = own[i];
      common_count += common;
    }
  }
  pair.shared_steps = shared_steps(common_count);
  return pair;
}

}  // namespace video_attn::hopper
