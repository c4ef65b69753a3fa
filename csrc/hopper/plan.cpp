#include "hopper/plan.h"

namespace video_attn::hopper {

RowPlan plan_row(const std::vector<int32_t>& blocks, const Side& kv_side) {
  const auto entry = [&](int32_t position) -> ListEntry {
    const int32_t block = blocks.at(position);
    return {block, valid_tokens(block, kv_side.block_size, kv_side.length, kv_side.lens.data)};
  };
  RowPlan row{{}, {0, 0}};
  for (int32_t i = 0; i < static_cast<int32_t>(blocks.size()); ++i) row.counts.add(entry(i).valid);
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
      const bool common = valid == kUnit &&
                          holds_block(other.data(), 1, static_cast<int32_t>(other.size()), own[i]);
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
