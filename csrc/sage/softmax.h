// The running softmax of 16 rows, of which a lane holds two (l / 4 and l / 4 + 8), base 2.
#pragma once

#include "params.h"
#include "primitives.h"

namespace video_attn::sage {

inline constexpr float kMinusInfinity = -__builtin_inff();

struct RowState {
  float maximum[2] = {kMinusInfinity, kMinusInfinity};  // of all keys so far
  float total[2] = {0.0f, 0.0f};                        // of this lane's keys only
};

// How scores become base-2 logits: (s - offset) * factor.
struct ScoreScale {
  float offset, factor;
};

// Turns the scores of a tile into logits, -inf for keys at or past `limit` of their row.
SAGE_DEVICE ScoreScale hide_keys(float (&s)[kTile / 8][4], ScoreScale scale,
                                 const int (&limit)[2]) {
  const int column = thread_index() % 4 * 2;
  SAGE_UNROLL
  for (int n = 0; n < kTile / 8; ++n) {
    SAGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool seen = n * 8 + column + (i & 1) < limit[i / 2];
      s[n][i] = seen ? (s[n][i] - scale.offset) * scale.factor : kMinusInfinity;
    }
  }
  return {0.0f, 1.0f};
}

// Turns scores into weights exp2(logit - maximum) * 2^kExponent, and returns in `keep` what the
// older weights must be multiplied by.
template <int kExponent>
SAGE_DEVICE void weigh(float (&s)[kTile / 8][4], ScoreScale scale, RowState& state,
                       float (&keep)[2]) {
  SAGE_UNROLL
  for (int row = 0; row < 2; ++row) {
    float largest = s[0][row * 2];
    SAGE_UNROLL
    for (int n = 0; n < kTile / 8; ++n) {
      largest = maximum(largest, maximum(s[n][row * 2], s[n][row * 2 + 1]));
    }
    largest = (largest - scale.offset) * scale.factor;
    largest = maximum(largest, shuffle_xor(largest, 1));
    largest = maximum(largest, shuffle_xor(largest, 2));
    largest = maximum(largest, state.maximum[row]);
    // A row that has seen no key yet has no maximum to subtract.
    const float pivot = largest == kMinusInfinity ? 0.0f : largest;
    keep[row] = exp2_fast(state.maximum[row] - pivot);
    state.maximum[row] = largest;
    float sum = 0.0f;
    const float shift = static_cast<float>(kExponent) - pivot;
    SAGE_UNROLL
    for (int n = 0; n < kTile / 8; ++n) {
      SAGE_UNROLL
      for (int i = row * 2; i < row * 2 + 2; ++i) {
        s[n][i] = exp2_fast(fused_multiply_add(s[n][i] - scale.offset, scale.factor, shift));
        sum += s[n][i];
      }
    }
    state.total[row] = fused_multiply_add(state.total[row], keep[row], sum);
  }
}

// The sum of a row over the four lanes that share it.
SAGE_DEVICE float row_total(float lanes_total) {
  lanes_total += shuffle_xor(lanes_total, 1);
  return lanes_total + shuffle_xor(lanes_total, 2);
}

}  // namespace video_attn::sage
