// Lists of blocks, and the valid tokens of blocks: what a mask says, for host and device.
#pragma once

#include <cstdint>

#include "device/language.h"

namespace video_attn {

// Valid tokens of each block, int32 [batch or 1, blocks]; data is null when all are valid.
struct BlockLens {
  const int32_t* data;
  int64_t batch_stride;

  VIDEO_ATTN_HOST_DEVICE const int32_t* of(int32_t batch) const {
    return data == nullptr ? nullptr : data + batch * batch_stride;
  }
};

// One side of the problem: its tokens, the blocks they are cut into, and the valid ones.
struct Side {
  int32_t length;
  int32_t block_size;  // dense attention: 128
  BlockLens lens;
};

// For each block of one side an ascending list of blocks of the other; counts is null for dense
// attention. Broadcast dimensions have stride 0.
struct BlockLists {
  const int32_t* counts;   // [batch or 1, heads or 1, rows]
  const int32_t* indices;  // [batch or 1, heads or 1, rows, longest]
  int32_t longest;
  int64_t counts_batch_stride, counts_head_stride, counts_row_stride;
  int64_t indices_batch_stride, indices_head_stride, indices_row_stride, indices_stride;
};

VIDEO_ATTN_HOST_DEVICE constexpr int32_t divide_up(int32_t value, int32_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Valid tokens of block `block` of a side of `length` tokens, whatever `lens` says about tokens
// past the end; it is null when all are valid.
VIDEO_ATTN_HOST_DEVICE inline int32_t valid_tokens(int32_t block, int32_t block_size,
                                                   int32_t length, const int32_t* lens) {
  const int64_t left = length - static_cast<int64_t>(block) * block_size;
  int64_t valid = left < block_size ? left : block_size;
  if (lens != nullptr && lens[block] < valid) valid = lens[block];
  return valid > 0 ? static_cast<int32_t>(valid) : 0;
}
VIDEO_ATTN_HOST_DEVICE inline int32_t valid_tokens(const Side& side, int32_t batch, int32_t block) {
  return valid_tokens(block, side.block_size, side.length, side.lens.of(batch));
}

// The list of one row: where its indices lie, and how many there are.
struct RowList {
  const int32_t* indices;  // null: entry i is block i
  int64_t stride;
  int32_t count;

  VIDEO_ATTN_HOST_DEVICE int32_t block(int32_t entry) const {
    return indices == nullptr ? entry : indices[entry * stride];
  }
};

// The blocks of `side` that row `row` of the lists names; of dense attention, all.
VIDEO_ATTN_HOST_DEVICE inline RowList row_list(const BlockLists& lists, const Side& side,
                                               int32_t batch, int32_t head, int32_t row) {
  if (lists.counts == nullptr) return {nullptr, 0, divide_up(side.length, side.block_size)};
  const int64_t count_at = batch * lists.counts_batch_stride + head * lists.counts_head_stride +
                           row * lists.counts_row_stride;
  const int64_t indices_at = batch * lists.indices_batch_stride + head * lists.indices_head_stride +
                             row * lists.indices_row_stride;
  return {lists.indices + indices_at, lists.indices_stride, lists.counts[count_at]};
}

}  // namespace video_attn
