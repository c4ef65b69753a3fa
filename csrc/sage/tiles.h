// How codes lie in memory. A tile of 64 tokens lies in global memory exactly as it will lie in
// shared memory, so that loading one is a plain contiguous copy:
//
//   Q, K       64 tokens x padded_dim bytes
//   V, fp16    panels of 64 channels, each 64 tokens x 128 bytes
//   V, FP8     padded_dim channels x 64 bytes, one byte per token; within every 16 tokens those of
//              position p are token v_token(p): the order in which a lane of the QK^T accumulator
//              holds its columns, so that P needs no exchange between lanes
//
// Rows have 64 or 128 bytes, in chunks of 16; chunk c of row r is stored at chunk c ^ f(r), so that
// eight rows of one chunk lie in different banks. The same f is the hardware's 64- and 128-byte
// swizzle.
#pragma once

#include "params.h"
#include "primitives.h"

namespace video_attn::sage {

template <int kRowBytes>
VIDEO_ATTN_HOST_DEVICE constexpr int chunk_offset(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  const int mixed = kRowBytes == 128 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  return row * kRowBytes + mixed * 16;
}

template <int kDim>
inline constexpr int kQkTileBytes = kTile * kDim;

inline constexpr int kPanelChannels = 64;
inline constexpr int kPanelBytes = kTile * kPanelChannels * 2;

template <VCode kCode, int kDim>
inline constexpr int kVTileBytes = kTile * kDim * (kCode == VCode::kFp8 ? 1 : 2);

// Offset of 16 bytes of an fp16 tile of V: eight channels of one token.
VIDEO_ATTN_HOST_DEVICE constexpr int v16_offset(int token, int eight_channels) {
  return (eight_channels >> 3) * kPanelBytes + chunk_offset<128>(token, eight_channels & 7);
}

// The token, within 16, at byte `position` of an FP8 tile of V.
VIDEO_ATTN_HOST_DEVICE constexpr int v_token(int position) {
  return position / 4 * 2 + (position & 1) + (position & 2) * 4;
}

// Tokens of a tile that count: its block's valid length and the end of the sequence cut it.
VIDEO_ATTN_DEVICE int valid_in_tile(const Side& side, int batch, int tile) {
  const int first = tile * kTile, block = first / side.block_size;
  const int valid = valid_tokens(side, batch, block) - (first - block * side.block_size);
  return valid < 0 ? 0 : (valid > kTile ? kTile : valid);
}

// Which scale of a tile belongs to a token of it; see quantize.py, scale_groups.
VIDEO_ATTN_DEVICE int q_group(int groups, int row) {
  return groups == 1 ? 0 : groups == 4 ? row / 16 : row / 16 * 8 + row % 8;
}

VIDEO_ATTN_DEVICE int k_group(int groups, int row) { return groups == 1 ? 0 : row % 8 / 2; }

}  // namespace video_attn::sage
