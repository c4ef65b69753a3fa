// Rows of a tile, as a thread of the quantizers holds them, rotated by a normalised Hadamard
// matrix.
#pragma once

#include "params.h"
#include "primitives.h"
#include "statistics_kernel.h"

namespace video_attn::sage {

// 1 / sqrt(size) of the sizes that a rotation can have.
VIDEO_ATTN_DEVICE float rotation_norm(int size) {
  return size == 16 ? 0.25f : size == 32 ? 0.176776695f : size == 64 ? 0.125f : 0.088388348f;
}

// Rotates every run of `size` channels, 16 to kDim of them: quantize.py, hadamard_rotation. Sums
// and differences of channels 1, 2 and 4 apart are this thread's own, those of 8 and more need
// lanes that hold other channels of the same rows.
template <int kDim>
VIDEO_ATTN_DEVICE void rotate(float (&x)[kGroupRows][kLaneChannels], int size) {
  const int lane = Lane<kDim>::channel() / kLaneChannels;
  const float norm = rotation_norm(size);
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
    for (int apart = 1; apart < kLaneChannels; apart *= 2) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        if (c & apart) continue;
        const float low = x[r][c], high = x[r][c + apart];
        x[r][c] = low + high;
        x[r][c + apart] = low - high;
      }
    }
#pragma unroll
    for (int mask = 1; mask < Lane<kDim>::kLanes; mask *= 2) {
      if (mask * kLaneChannels >= size) continue;  // the same for all threads
      const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        x[r][c] = fused_multiply_add(x[r][c], sign, shuffle_xor(x[r][c], mask));
      }
    }
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) x[r][c] *= norm;
  }
}

}  // namespace video_attn::sage
