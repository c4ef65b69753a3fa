// The online softmax of a warpgroup, in base 2, on accumulators of 64 query rows: a thread holds
// two rows, eight apart, of every 16 x 16 tile of its warp, and shares each with 3 lanes.
#pragma once

#include <cmath>

#include "hopper/primitives.h"
#include "hopper/step_list.h"
#include "kittens.cuh"

namespace video_attn::hopper {

constexpr int32_t kRowsPerThread = 2;

// Sums of a thread's 32 weights of a row and step: above the first one weights are too large for
// 16 bits to come, above the second one they may be infinite.
constexpr float kLargeSum = 0x1p8f, kLostSum = 0x1p64f;

using Scores = kittens::rt_fl<16, kStepTokens>;

// Of the four lanes that share a row.
__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// Hands `use` every pair of neighbouring accumulators of this thread's row `row` (0 or 1).
template <class Tile, class Use>
__device__ inline void for_each_pair(Tile& tile, int32_t row, Use use) {
#pragma unroll
  for (int32_t column = 0; column < Tile::width; ++column) {
    use(tile.tiles[0][column].data[row]);
    use(tile.tiles[0][column].data[row + 2]);
  }
}

// Scores of keys past the valid ones of the two halves of a step become minus infinity.
__device__ inline void mask_scores(Scores& scores, int32_t first_valid, int32_t second_valid) {
  const int32_t lane_key = threadIdx.x % 4 * 2;
#pragma unroll
  for (int32_t column = 0; column < Scores::width; ++column) {
    const bool first = column * 16 < kUnit;
    const int32_t valid = first ? first_valid : second_valid;
#pragma unroll
    for (int32_t part = 0; part < 4; ++part) {
      const int32_t key = column * 16 - (first ? 0 : kUnit) + part / 2 * 8 + lane_key;
      float2& pair = scores.tiles[0][column].data[part];
      pair.x = key < valid ? pair.x : -INFINITY;
      pair.y = key + 1 < valid ? pair.y : -INFINITY;
    }
  }
}

class Softmax {
 public:
  // `scale` is that of the scores times log2(e), above zero.
  __device__ explicit Softmax(float scale) : scale_(scale) {}

  // Scores of the first step become weights.
  __device__ void first(Scores& scores) {
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) {
      maximum_[row] = quad_max(local_maximum(scores, row)) * scale_;
      sum_[row] = 0.0f;
    }
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) exponentiate(scores, row);
    accept();
  }

  // Takes the scores of a further step into account. True, for the whole warp alike, when the
  // output so far must be rescaled. The maximum may stay behind the true one by a factor of 2^8 of
  // weights: they are as exact there, and most steps rescale nothing.
  __device__ bool follow(Scores& scores) {
    const float maxima[kRowsPerThread] = {local_maximum(scores, 0), local_maximum(scores, 1)};
    const bool grown = maxima[0] * scale_ - maximum_[0] > kMaximumLag ||
                       maxima[1] * scale_ - maximum_[1] > kMaximumLag;
    const bool rescaled = __any_sync(~0u, grown);
    if (rescaled) {
#pragma unroll
      for (int32_t row = 0; row < kRowsPerThread; ++row) {
        raise_maximum(row, fmaxf(maximum_[row], quad_max(maxima[row]) * scale_));
      }
    }
    return rescaled;
  }

  // The scores of one row become weights, by the maximum as it stands.
  __device__ void exponentiate(Scores& scores, int32_t row) {
    const float shift = -maximum_[row];
    float even = 0.0f, odd = 0.0f;
    for_each_pair(scores, row, [&](float2& pair) {
      pair.x = exp2_approximate(fmaf(pair.x, scale_, shift));
      pair.y = exp2_approximate(fmaf(pair.y, scale_, shift));
      even += pair.x;
      odd += pair.y;
    });
    step_sum_[row] = even + odd;
  }

  // The weights of a step count.
  __device__ void accept() {
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) sum_[row] += step_sum_[row];
  }

  // Whether weights, made without a look at their maximum, have a sum above `limit`, in any row of
  // the warp. A sum that is no number has none: nor will the output of its row be one.
  __device__ bool exceeds(float limit) const {
    return __any_sync(~0u, step_sum_[0] > limit || step_sum_[1] > limit);
  }

  // Weights that grew too large, but are finite, by the maximum that they ought to have had. The
  // output so far must be rescaled.
  __device__ void shrink(Scores& weights) {
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) {
      const float largest = quad_max(local_maximum(weights, row));
      raise_maximum(row, maximum_[row] + fmaxf(log2f(largest), 0.0f));
      step_sum_[row] *= correction_[row];
      for_each_pair(weights, row, [&](float2& pair) {
        pair.x *= correction_[row];
        pair.y *= correction_[row];
      });
    }
  }

  template <class Output>
  __device__ void rescale(Output& output) const {
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) {
      for_each_pair(output, row, [&](float2& pair) {
        pair.x *= correction_[row];
        pair.y *= correction_[row];
      });
    }
  }

  // The sum of a row's weights, in all of its lanes.
  __device__ float total(int32_t row) const { return quad_sum(sum_[row]); }

  // The natural logarithm of the sum of the exponentials of a row.
  __device__ float log_sum(int32_t row, float total) const {
    constexpr float kLn2 = 0.6931471805599453f;
    return (maximum_[row] + log2f(total)) * kLn2;
  }

 private:
  static constexpr float kMaximumLag = 8.0f;

  __device__ void raise_maximum(int32_t row, float maximum) {
    correction_[row] = exp2_approximate(maximum_[row] - maximum);
    maximum_[row] = maximum;
    sum_[row] *= correction_[row];
  }

  // Of what this thread holds of a row.
  __device__ float local_maximum(Scores& scores, int32_t row) const {
    float even = -INFINITY, odd = -INFINITY;
    for_each_pair(scores, row, [&](float2& pair) {
      even = fmaxf(even, pair.x);
      odd = fmaxf(odd, pair.y);
    });
    return fmaxf(even, odd);
  }

  float scale_;
  float maximum_[kRowsPerThread] = {};  // times the scale
  float sum_[kRowsPerThread] = {};
  float step_sum_[kRowsPerThread] = {};
  float correction_[kRowsPerThread] = {};
};

}  // namespace video_attn::hopper
