// Videos in raster order: the tokens of a tile are a box of the video, which the tensor memory
// accelerator moves as it moves any box. The lists count tokens in tile order; 64 of them, as the
// kernels take them, are a part of a tile that is a box again. Text follows the video, in either
// order at the same places.
#pragma once

#include "hopper/params.h"
#include "hopper/step_list.h"

namespace video_attn::hopper {

// Division of numbers below 2^31 by a number known to the host: a product and a shift.
struct Divisor {
  uint32_t factor;
  int32_t shift;

  static Divisor of(int32_t divisor) {
    int32_t bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    const uint64_t power = uint64_t{1} << (31 + bits);
    return {static_cast<uint32_t>((power + divisor - 1) / divisor), 31 + bits};
  }
  VIDEO_ATTN_HOST_DEVICE int32_t divide(int32_t value) const {
    return static_cast<int32_t>((static_cast<uint64_t>(value) * factor) >> shift);
  }
};

// The first token of a box, in the coordinates of its tensor.
struct VideoPlace {
  int32_t w, h, t;
};

struct VideoBoxes {
  int32_t tokens;  // of the video
  int32_t height, width;
  int32_t tile_t, tile_h, tile_w, tile_tokens;
  int32_t box_t, box_h;               // a box is as wide as its tile
  int32_t width_bits, height_bits;    // of a box, whose sides are powers of 2
  int32_t tiles_h, tiles_w, boxes_h;  // of the grid, and boxes of a tile
  Divisor by_tile_tokens, by_tiles_h, by_tiles_w, by_boxes_h;

  VIDEO_ATTN_HOST_DEVICE bool hold(int32_t token) const { return token < tokens; }

  // Where 64 tokens lie, from `token` on in tile order.
  VIDEO_ATTN_HOST_DEVICE VideoPlace place(int32_t token) const {
    const int32_t tile = by_tile_tokens.divide(token);
    const int32_t box = (token - tile * tile_tokens) / kUnit;
    const int32_t row = by_tiles_w.divide(tile);
    const int32_t frame = by_tiles_h.divide(row);
    const int32_t box_frame = by_boxes_h.divide(box);
    return {(tile - row * tiles_w) * tile_w,
            (row - frame * tiles_h) * tile_h + (box - box_frame * boxes_h) * box_h,
            frame * tile_t + box_frame * box_t};
  }

  // The raster position of one of the 64 tokens of a box.
  VIDEO_ATTN_HOST_DEVICE int32_t position(const VideoPlace& place, int32_t token) const {
    const int32_t w = place.w + (token & ((1 << width_bits) - 1));
    const int32_t h = place.h + ((token >> width_bits) & ((1 << height_bits) - 1));
    const int32_t t = place.t + (token >> (width_bits + height_bits));
    return (t * height + h) * width + w;
  }
};

// The boxes of a video; false where 64 tokens of a tile are none, or a tile is cut by the border.
inline bool make_video_boxes(const VideoShape& shape, VideoBoxes& boxes) {
  boxes = {};
  int64_t tokens = 1;
  for (int axis = 0; axis < 3; ++axis) {
    if (shape.grid[axis] <= 0 || shape.tile[axis] <= 0) return false;
    if (shape.tile[axis] > 1024 || shape.grid[axis] % shape.tile[axis] != 0) return false;
    tokens *= shape.grid[axis];
    if (tokens > INT32_MAX) return false;
  }
  const auto [tile_t, tile_h, tile_w] = shape.tile;
  if (kUnit % tile_w != 0) return false;
  const int32_t box_h = tile_h < kUnit / tile_w ? tile_h : kUnit / tile_w;
  if (tile_h % box_h != 0 || kUnit % (tile_w * box_h) != 0) return false;
  const int32_t box_t = kUnit / (tile_w * box_h);
  if (tile_t % box_t != 0) return false;
  boxes.tokens = static_cast<int32_t>(tokens);
  boxes.height = shape.grid[1], boxes.width = shape.grid[2];
  boxes.tile_t = tile_t, boxes.tile_h = tile_h, boxes.tile_w = tile_w;
  boxes.tile_tokens = tile_t * tile_h * tile_w;
  boxes.box_t = box_t, boxes.box_h = box_h;
  while ((1 << boxes.width_bits) < tile_w) ++boxes.width_bits;
  while ((1 << boxes.height_bits) < box_h) ++boxes.height_bits;
  boxes.tiles_h = shape.grid[1] / tile_h, boxes.tiles_w = shape.grid[2] / tile_w;
  boxes.boxes_h = tile_h / box_h;
  boxes.by_tile_tokens = Divisor::of(boxes.tile_tokens);
  boxes.by_tiles_h = Divisor::of(boxes.tiles_h), boxes.by_tiles_w = Divisor::of(boxes.tiles_w);
  boxes.by_boxes_h = Divisor::of(boxes.boxes_h);
  return true;
}

}  // namespace video_attn::hopper
