// The running softmax of 16 rows, of which a lane holds two (l / 4 and l / 4 + 8), base 2.
//
// Scores come as s[tile][n][i]: one or more tiles of 64 keys, each as scores.h lays them out.
#pragma once

#include "elements.h"
#include "params.h"
#include "primitives.h"

namespace video_attn::sage {

inline constexpr int kGroupThreads = 128;  // threads that share a tile of 64 rows

// Row of its tile that thread_index() holds; i is 0 or 1.
VIDEO_ATTN_DEVICE int row_in_tile(int i) {
  return thread_index() % kGroupThreads / 32 * 16 + thread_index() % 32 / 4 + i * 8;
}

inline constexpr int kAllKeys = 0x7FFFFFFF - kTile;  // a last key that hides none
inline constexpr float kMinusInfinity = -__builtin_inff();

struct RowState {
  float maximum[2] = {kMinusInfinity, kMinusInfinity};  // of all keys so far
  float total[2] = {0.0f, 0.0f};                        // of this lane's keys only
};

// How the scores of a tile become base-2 logits: (s - offset) * factor.
struct ScoreScale {
  float offset, factor;
};

// Turns the scores of a tile into logits, -inf for keys at or past `limit` of their row. kShifted:
// to those of each key its number in `shift` is added.
template <bool kShifted>
VIDEO_ATTN_DEVICE ScoreScale make_logits(float (&s)[kTile / 8][4], ScoreScale scale,
                                         const int (&limit)[2], const float* shift) {
  const int column = thread_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    Words2 added{};
    if (kShifted) added = *reinterpret_cast<const Words2*>(shift + n * 8 + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool seen = n * 8 + column + (i & 1) < limit[i / 2];
      float x = s[n][i] - scale.offset;
      if constexpr (kShifted) {
        x = fused_multiply_add(x, scale.factor, from_bits(added.w[i & 1]));
      } else {
        x *= scale.factor;  // a sum with 0 would cost registers
      }
      s[n][i] = seen ? x : kMinusInfinity;
    }
  }
  return {0.0f, 1.0f};
}

// The same for tile `index` where it is needed: where keys are past the first `valid`, or after
// `last_key`, the last one that the first row sees (row r sees r more), or with a shift.
template <bool kShifted>
VIDEO_ATTN_DEVICE void adjust_scores(float (&s)[kTile / 8][4], ScoreScale& scale, int last_key,
                                     int index, int valid, const float* shift) {
  const int seen = last_key - index * kTile + 1;  // keys of the tile, by the first row
  if (valid == kTile && seen >= kTile && !kShifted) return;
  int limit[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    limit[i] = seen + row_in_tile(i) < valid ? seen + row_in_tile(i) : valid;
  }
  scale = make_logits<kShifted>(s, scale, limit, shift);
}

// The largest logit of a row (0 or 1) among this lane's keys of a tile.
VIDEO_ATTN_DEVICE float largest_logit(const float (&s)[kTile / 8][4], ScoreScale scale, int row) {
  float largest = maximum(s[0][row * 2], s[0][row * 2 + 1]);
#pragma unroll
  for (int n = 1; n < kTile / 8; ++n) {
    largest = maximum(largest, maximum(s[n][row * 2], s[n][row * 2 + 1]));
  }
  return (largest - scale.offset) * scale.factor;
}

// Turns scores into weights exp2(logit - maximum) * 2^kExponent, and returns in `keep` what the
// older weights must be multiplied by.
template <int kExponent, int kTiles>
VIDEO_ATTN_DEVICE void weigh(float (&s)[kTiles][kTile / 8][4], const ScoreScale (&scale)[kTiles],
                             RowState& state, float (&keep)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = largest_logit(s[0], scale[0], row);
#pragma unroll
    for (int t = 1; t < kTiles; ++t) {
      largest = maximum(largest, largest_logit(s[t], scale[t], row));
    }
    largest = maximum(largest, shuffle_xor(largest, 1));
    largest = maximum(largest, shuffle_xor(largest, 2));
    largest = maximum(largest, state.maximum[row]);
    // A row that has seen no key yet has no maximum to subtract.
    const float pivot = largest == kMinusInfinity ? 0.0f : largest;
    keep[row] = exp2_fast(state.maximum[row] - pivot);
    state.maximum[row] = largest;
    const float shift = static_cast<float>(kExponent) - pivot;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[t][n][row * 2 + i];
          x = exp2_fast(fused_multiply_add(x - scale[t].offset, scale[t].factor, shift));
          sum[i] += x;
        }
      }
    }
    state.total[row] = fused_multiply_add(state.total[row], keep[row], sum[0] + sum[1]);
  }
}

// The sum of a row over the four lanes that share it.
VIDEO_ATTN_DEVICE float row_total(float lanes_total) {
  lanes_total += shuffle_xor(lanes_total, 1);
  return lanes_total + shuffle_xor(lanes_total, 2);
}

}  // namespace video_attn::sage
