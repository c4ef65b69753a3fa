// The key tiles of one block of query rows, one after the other: from its list of key blocks, or
// all of them; tiles without a valid key are left out.
#pragma once

#include "params.h"
#include "tiles.h"

namespace video_attn::sage {

struct KeyTile {
  int index;  // -1 past the last one
  int valid;  // keys that count, from the first on

  SAGE_DEVICE bool exists() const { return index >= 0; }
};

class TileCursor {
 public:
  // `last_key`: the last key that any row of the block may see.
  SAGE_DEVICE TileCursor(const AttentionParams& p, int batch, int head, int first_row, int last_key)
      : end_(tiles_in(last_key + 1)) {
    if (p.lists.counts == nullptr) {
      blocks_ = 1;
      tiles_per_block_ = end_;
      return;
    }
    const BlockLists& lists = p.lists;
    const int64_t row = first_row / p.q_side.block_size;
    blocks_ = lists.counts[batch * lists.counts_batch_stride + head * lists.counts_head_stride +
                           row * lists.counts_block_stride];
    indices_ = lists.indices + batch * lists.indices_batch_stride +
               head * lists.indices_head_stride + row * lists.indices_block_stride;
    stride_ = lists.indices_stride;
    tiles_per_block_ = p.kv_side.block_size / kTile;
  }

  SAGE_DEVICE KeyTile next(const Side& kv_side, int batch) {
    while (block_ < blocks_) {
      if (in_block_ == 0) first_ = indices_ ? indices_[block_ * stride_] * tiles_per_block_ : 0;
      const int tile = first_ + in_block_;
      if (++in_block_ == tiles_per_block_) {
        in_block_ = 0;
        ++block_;
      }
      if (tile >= end_) continue;
      const int valid = valid_in_tile(kv_side, batch, tile);
      if (valid > 0) return {tile, valid};
    }
    return {-1, 0};
  }

 private:
  int end_;
  const int32_t* indices_ = nullptr;
  int64_t stride_ = 0;
  int blocks_ = 0, tiles_per_block_ = 0;
  int block_ = 0, in_block_ = 0, first_ = 0;
};

}  // namespace video_attn::sage
