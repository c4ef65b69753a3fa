// The key tiles of one block of query rows, as cursor.h, walked by the 32 lanes of a warp together:
// they look up 32 entries at a time, so that a list costs two dependent reads per 32 tiles.
#pragma once

#include "cursor.h"
#include "params.h"
#include "primitives_hopper.h"
#include "tiles.h"

namespace video_attn::sage {

class WarpWalk {
 public:
  // `last_key`: the last key that any row of the block may see, -1 for none.
  VIDEO_ATTN_DEVICE WarpWalk(const AttentionParams& p, int batch, int head, int first_row,
                             int last_key)
      : side_(p.kv_side),
        list_(row_list(p.lists, p.kv_side, batch, head, first_row / p.q_side.block_size)),
        batch_(batch),
        end_(tiles_in(last_key + 1)),
        tiles_per_block_(tiles_per_block(p, end_)),
        entries_(last_key < 0 ? 0 : list_.count * tiles_per_block_) {}

  // The next tile with a valid key, the same in every lane.
  VIDEO_ATTN_DEVICE KeyTile next() {
    while (waiting_ == 0) {
      if (looked_up_ >= entries_) return {-1, 0};
      look_up();
    }
    const int lane = first_bit(waiting_);
    waiting_ &= waiting_ - 1;
    return {shuffle(tile_.index, lane), shuffle(tile_.valid, lane)};
  }

 private:
  VIDEO_ATTN_DEVICE void look_up() {
    const int entry = looked_up_ + thread_index() % 32;
    looked_up_ += 32;
    tile_ = {entry, 0};
    if (entry < entries_) {
      const int block = list_.block(entry / tiles_per_block_);
      tile_.index = block * tiles_per_block_ + entry % tiles_per_block_;
      if (tile_.index < end_) tile_.valid = valid_in_tile(side_, batch_, tile_.index);
    }
    waiting_ = ballot(tile_.valid > 0);
  }

  const Side& side_;
  const RowList list_;
  const int batch_, end_, tiles_per_block_, entries_;
  int looked_up_ = 0;
  uint32_t waiting_ = 0;  // lanes whose tile has not been handed out
  KeyTile tile_{-1, 0};   // of this lane
};

}  // namespace video_attn::sage
