// The key tiles of one block of query rows, one after the other: from its list of key blocks, or
// all of them; tiles without a valid key are left out.
#pragma once

#include "params.h"
#include "tiles.h"

namespace video_attn::sage {

struct KeyTile {
  int index;  // -1 past the last one
  int valid;  // keys that count, from the first on

  VIDEO_ATTN_DEVICE bool exists() const { return index >= 0; }
};

// Tiles of a key block. Dense attention has one block, of which only those before `end` count.
VIDEO_ATTN_DEVICE int tiles_per_block(const AttentionParams& p, int end) {
  return p.lists.counts == nullptr ? end : p.kv_side.block_size / kTile;
}

class TileCursor {
 public:
  // `last_key`: the last key that any row of the block may see.
  VIDEO_ATTN_DEVICE TileCursor(const AttentionParams& p, int batch, int head, int first_row,
                               int last_key)
      : list_(row_list(p.lists, p.kv_side, batch, head, first_row / p.q_side.block_size)),
        end_(tiles_in(last_key + 1)),
        tiles_per_block_(tiles_per_block(p, end_)) {}

  VIDEO_ATTN_DEVICE KeyTile next(const Side& kv_side, int batch) {
    while (block_ < list_.count) {
      if (in_block_ == 0) first_ = list_.block(block_) * tiles_per_block_;
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
  RowList list_;
  int end_, tiles_per_block_;
  int block_ = 0, in_block_ = 0, first_ = 0;
};

}  // namespace video_attn::sage
